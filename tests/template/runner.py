"""A GitHub runner, as far as the steps of a rendered workflow need it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.template.project import Project, tool

#: Records its calls, with stdin if that is the text, and answers from files.
GH = """#!/bin/sh
here=$(dirname "$0")
printf '%s\\n' "$*" >>"$here/gh.log"
case "$*" in *"--body-file -"*) sed 's/^/| /' >>"$here/gh.log" ;; esac
case "$1 $2" in
"issue list") cat "$here/open" 2>/dev/null ;;
"issue create") echo 7 >"$here/open" ;;
"issue close") rm "$here/open" ;;
"api "*) cat "$here/newest" ;;
esac
exit 0
"""


class Runner:
    """Runs jobs of a project's workflow, with a `gh` that only records.

    Attributes:
        place: A directory for a runner's files outside of the checkout.
        summary: The job's summary, which the steps wrote.
        printed: The output of the steps.
    """

    def __init__(self, project: Project, place: Path) -> None:
        self.project, self.place = project, place
        self.printed = self.summary = ""
        place.mkdir()
        (place / "gh").write_text(GH)
        (place / "gh").chmod(0o755)

    def workflow(self, name: str) -> dict[str, Any]:
        """A workflow of the project."""
        text = self.project.text(f".github/workflows/{name}.yml")
        found: dict[str, Any] = yaml.safe_load(text)
        return found

    def job(self, name: str, job: str, **values: str) -> dict[str, str]:
        """Run all steps of a job; raise at the first one that fails.

        Args:
            name: The workflow.
            job: The job.
            values: The values of expressions, with `_` for each dot.

        Returns:
            The outputs of its steps.
        """
        workflow = self.workflow(name)
        files = {key: self.place / key for key in ("ENV", "OUTPUT", "STEP_SUMMARY")}
        for path in files.values():
            path.write_text("")
        env = {
            **os.environ,
            "PATH": os.pathsep.join(
                [str(self.place), str(Path(tool("uv")).parent), os.environ["PATH"]]
            ),
            "RUNNER_TEMP": str(self.place),
            "GITHUB_REPOSITORY": "zoe-dev/myproj",
            "GITHUB_SHA": values.get("GITHUB_SHA", ""),
            **{f"GITHUB_{key}": str(path) for key, path in files.items()},
            **workflow["env"],
        }
        try:
            for step in workflow["jobs"][job]["steps"]:
                env.update(outputs(files["ENV"].read_text()))
                if "run" in step:
                    self.step(step, {**env, **expand(step.get("env", {}), values)})
        finally:
            self.summary = files["STEP_SUMMARY"].read_text()
            end_agent(outputs(files["ENV"].read_text()))
        return outputs(files["OUTPUT"].read_text())

    def step(self, step: dict[str, Any], env: dict[str, str]) -> None:
        """Run a step as GitHub does."""
        assert "${{" not in step["run"], "an expression in a shell"
        script = self.place / "script.sh"
        script.write_text(step["run"])
        done = subprocess.run(
            ["bash", "-e", str(script)],
            cwd=self.project.path,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        self.printed += done.stdout
        assert done.returncode == 0, f"{done.returncode}: {step['run']}\n{done.stdout}"

    def asked(self) -> list[str]:
        """The calls of `gh` since the last query."""
        log = self.place / "gh.log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


def expand(env: dict[str, str], values: dict[str, str]) -> dict[str, str]:
    """An environment with its expressions replaced."""

    def value(found: re.Match[str]) -> str:
        return values[found[1].replace(".", "_")]

    return {key: re.sub(r"\$\{\{ (.*?) \}\}", value, text) for key, text in env.items()}


def outputs(text: str) -> dict[str, str]:
    """Names and values in one of the files that GitHub reads."""
    found: dict[str, str] = {}
    lines = iter(text.splitlines())
    for line in lines:
        if "<<" in line:
            key, end = line.split("<<")
            found[key] = "\n".join(iter(lambda: next(lines), end))
        else:
            key, _, found[key] = line.partition("=")
    return found


def end_agent(env: dict[str, str]) -> None:
    """Kill the agent that a job started, like the end of a job on GitHub."""
    if "SSH_AGENT_PID" in env:
        subprocess.run(["ssh-agent", "-k"], env={**os.environ, **env}, capture_output=True)
