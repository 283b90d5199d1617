"""The entry point: standard streams, rights, then the command."""

from __future__ import annotations

import os
import sys

from .cli import ELSEWHERE, Call, Options, find_command, help_all, help_for, parse
from .state import Failure, cache, end_with_sudo, home, shown, why

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PROGRAM = (
    f"import sys; sys.path.insert(0, {_ROOT!r}); sys.argv[0] = sys.argv.pop(1); "
    "from orbctl_simulator.__main__ import main; sys.exit(main())"
)


def _open_streams() -> None:
    """The caller may have closed 0, 1 or 2; the next file to be opened must not get that number."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _through_sudo(program: str, words: list[str]) -> int:
    """Restart as root, with the caller's own state directory.

    Values reach the new process through the environment, because any user can read an argv.
    """
    os.environ["ORBCTL_SIMULATOR_CALLER"] = f"{os.getpid()} {':'.join(os.environ)}"
    os.environ["ORBCTL_SIMULATOR_HOME"] = home()
    os.environ["ORBCTL_SIMULATOR_CACHE"] = cache()
    for path in (home(), cache()):
        os.makedirs(path, mode=0o700, exist_ok=True)
    kept = {name for name in os.environ if name.startswith("ORBCTL_SIMULATOR_")}
    kept |= {name for name in os.environ.get("ORBENV", "").split(":") if name in os.environ}
    kept |= {name for name in os.environ if name.lower().endswith("_proxy")}
    kept |= {"ORBENV", "TERM"}
    command = ["sudo", "-n", "--preserve-env=" + ",".join(sorted(kept)), "--"]
    command += [sys.executable, "-I", "-S", "-B", "-c", _PROGRAM, program, *words]
    if not _may_sudo():
        raise Failure(
            f"{program}: machines need root: run it as root, or allow this user to use sudo"
            " without a password"
        )
    os.execvp("sudo", command)


def _may_sudo() -> bool:
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    try:
        pid = os.posix_spawnp("sudo", ["sudo", "-n", "true"], os.environ, file_actions=quiet)
    except OSError:
        return False
    return os.waitpid(pid, 0)[1] == 0


def dispatch(program: str, words: list[str], call: Call) -> int:
    """Run one command line: prints its output and returns its exit code."""
    options = Options(program, call)
    if program == "orb" and (not words or words[0] not in ("help", "--help", "-h")):
        known = bool(words) and (find_command(words[0]) or words[0] in ELSEWHERE)
        words = words if known else ["run", *words]
    if not words or words[0] in ("--help", "-h") or words == ["help"]:
        sys.stdout.write(help_all(program))
        return 0
    word, *rest = words
    if word == "help":
        word, rest = rest[0], ["--help"]
    command = find_command(word)
    if command is None:
        if word in ELSEWHERE:
            raise Failure(f"{program}: {word} is not part of the simulator: it needs OrbStack")
        kind = "unknown flag: " if word.startswith("--") else "unknown shorthand flag: "
        shown = word if word.startswith("--") else f"'{word[1:2]}' in {word}"
        text = kind + shown if word.startswith("-") else f'unknown command "{word}" for "{program}"'
        raise Failure(f"Error: {text}\nRun '{program} --help' for usage.")
    rest, wants_help = parse(program, command, rest, options)
    if wants_help and command.name != "config":  # config has its own help
        sys.stdout.write(help_for(program, command))
        return 0
    module, function = command.does.split(":")
    handler = getattr(__import__(f"{__package__}.{module}", fromlist=[function]), function)
    result: int = handler(options, rest)
    return result


def program_name(path: str) -> str:
    name = os.path.basename(path)
    return "orbctl-simulator" if name in ("__main__.py", "-c") else name


def main() -> int:
    _open_streams()
    os.umask(0o022)  # the caller's umask would also apply in the machines
    program, words = program_name(sys.argv[0]), sys.argv[1:]
    try:
        if os.geteuid() != 0:
            return _through_sudo(program, words)
        end_with_sudo()
        if any(os.environ.get(f"ORBCTL_SIMULATOR_{name}") for name in ("LOG", "FAULTS", "BANNER")):
            from .calls import SpoiledCall

            spoiled = SpoiledCall([program, *words])
            return spoiled.carry_out(lambda: dispatch(program, words, spoiled))
        code = dispatch(program, words, Call())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking the interpreter apart takes longer than many calls
    except Failure as failure:
        sys.stdout.flush()
        sys.stderr.write(f"{failure}\n")
        return failure.code
    except BrokenPipeError:
        os._exit(141)
    except OSError as error:  # a full disk, or a permission that this root lacks
        what = error.filename or (words or ["help"])[0]
        sys.stderr.write(f"{program}: {shown(what)}: {why(error).lower()}\n")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
