"""`make demo`: a project created from the template, deployed twice to machines of its own.

Everything that this creates is inside the checkout, except the machines. These are recorded with
their ids, so that `make clean` deletes only them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import copier
import ending

from pyinfra_orbstack import inventory_files, programs, testing
from pyinfra_orbstack.inventory_files import CommandError
from pyinfra_orbstack.orbctl import RECORD_VARIABLE, Orbctl, OrbctlError, Record
from pyinfra_orbstack.targets import MACHINES

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
STATE = ROOT / ".cache" / "demo"
#: The settings needed to reach the demo's machines again.
SETTINGS = STATE / "settings.json"
RECORD = Record(STATE / "machines")


def render() -> Path:
    """Render the checkout's template into a directory that does not replace `demo` yet."""
    fresh = STATE / "demo"
    answers = STATE / "copier.yml"
    answers.parent.mkdir(parents=True, exist_ok=True)
    answers.write_text("{}\n")
    # The demo has no owner: the user's own defaults for copier are left out.
    os.environ["COPIER_SETTINGS_PATH"] = str(answers)
    with warnings.catch_warnings():
        # Uncommitted changes in the checkout are fine here.
        warnings.simplefilter("ignore")
        copier.run_copy(str(ROOT), fresh, defaults=True, overwrite=True, quiet=True, vcs_ref="HEAD")
    return fresh


def refuse_strangers(client: Orbctl, hosts: list[str]) -> None:
    """Stop if a machine exists that has a name of the demo's, but is not the demo's own."""
    recorded = RECORD.machines()
    names = [host[len(MACHINES) :] for host in hosts]
    for machine in client.machines():
        if machine.name in names and recorded.get(machine.name) != machine.id:
            raise CommandError(
                f"there already is a machine {machine.name!r} that this demo did not create: "
                "rename or delete it, then try again"
            )


def deploy(environment: dict[str, str]) -> tuple[int, int]:
    """Apply the project's deploy; return how many operations did and did not change something."""
    argv = programs.pyinfra_argv("-y", "inventories/local.py", "deploy.py")
    total = ""
    with ending.child(
        argv, cwd=DEMO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        for line in child.stdout or ():
            print(f"    {line}", end="", flush=True)
            total = line if "Grand total" in line else total
    # pyinfra's own table: hosts, success (with changes), error, no change.
    counts = [0 if word == "-" else int(word) for word in re.findall(r"\s(\d+|-)(?=\s|$)", total)]
    if child.wait() or len(counts) != 4 or counts[2]:
        raise CommandError("the deploy failed: see its output above")
    return counts[1], counts[3]


def show(environment: dict[str, str], *words: str) -> str:
    """A command line to paste, with its environment."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in environment.items()), shlex.join(words)])


def demo() -> None:
    """Render, create, deploy, deploy again, and report it."""
    existing = (DEMO / ".copier-answers.yml").exists()
    if DEMO.exists() and not existing:
        raise CommandError(f"{DEMO} exists and was not created by this demo: move it away first")
    command = programs.choose_orbctl()
    reach = programs.settings(command)
    os.environ.update(reach)
    # An earlier demo may have run elsewhere; its machines can only be deleted from there.
    if RECORD.machines() and json.loads(SETTINGS.read_text()) != reach:
        raise CommandError("an earlier demo used another orbctl: run `make clean` first")
    kind = "the simulator" if programs.is_simulator(command) else "OrbStack"
    print(f"1. Machines are {kind}'s: {command}")
    project_folder = DEMO if existing else render()
    hosts = inventory_files.inventory_hosts(project_folder / "inventories" / "local.py")
    refuse_strangers(Orbctl(), hosts)
    SETTINGS.write_text(json.dumps(reach))
    if existing:
        print("2. ./demo is there already and stays as it is")
    else:
        project_folder.rename(DEMO)
        print("2. Rendered the template into ./demo")
    environment = {
        **os.environ,
        RECORD_VARIABLE: str(RECORD.path),
        "PYTHONPATH": str(DEMO / "src"),
    }
    print("3. Applying ./demo/deploy.py, which creates machines that are missing", flush=True)
    changed, _ = deploy(environment)
    print("4. Applying it again", flush=True)
    again, unchanged = deploy(environment)
    if again:
        raise CommandError(
            f"the second run changed {again} operations instead of none: see its output above"
        )
    print(f"\nThe first run changed {changed} things, the second none of {unchanged}.")
    command_line = str(Path(sys.executable).with_name("pyinfra"))
    file = "/etc/ssh/sshd_config.d/10-demo.conf"
    print("What it wrote, read in the machine:")
    print(f"    {show(reach, command_line, hosts[0], 'exec', '--', 'cat', file)}")
    print("A shell in the machine:")
    print(f"    {show(reach, command, 'run', '-m', hosts[0][len(MACHINES) :])}")
    print("Remove all of it, the machines included:\n    make clean")


def clean() -> None:
    """Delete the demo's machines, and those that crashed tests left behind."""
    if SETTINGS.exists():
        os.environ.update(json.loads(SETTINGS.read_text()))
        for name in RECORD.delete_all(Orbctl()):
            print(f"deleted machine {name}")
    testing.sweep()


if __name__ == "__main__":
    ending.listen()
    try:
        clean() if "--clean" in sys.argv[1:] else demo()
    except (CommandError, OrbctlError) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit(130)
