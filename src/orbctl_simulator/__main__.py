"""The entry point: standard streams, rights, then the command."""

from __future__ import annotations

import os
import sys

from .cli import dispatch, program_name
from .state import Failure, end_with_sudo, home

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PROGRAM = (
    f"import sys; sys.path.insert(0, {_ROOT!r}); sys.argv[0] = sys.argv.pop(1); "
    "from orbctl_simulator.__main__ import main; sys.exit(main())"
)


def _open_streams() -> None:
    """A caller may have closed 0, 1 or 2; the next file opened must not take such a number."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _through_sudo(program: str, words: list[str]) -> int:
    """Start again as root, the state folder being the caller's own.

    Values reach the new process through the environment: an argv can be read by everyone.
    """
    os.environ["ORBCTL_SIMULATOR_CALLER"] = f"{os.getpid()} {':'.join(os.environ)}"
    os.environ["ORBCTL_SIMULATOR_HOME"] = home()
    os.makedirs(home(), mode=0o700, exist_ok=True)
    kept = {name for name in os.environ if name.startswith("ORBCTL_SIMULATOR_")}
    kept |= {name for name in os.environ.get("ORBENV", "").split(":") if name in os.environ}
    kept |= {"ORBENV", "TERM"}
    command = ["sudo", "-n", "--preserve-env=" + ",".join(sorted(kept)), "--"]
    command += [sys.executable, "-I", "-S", "-B", "-c", _PROGRAM, program, *words]
    if not _may_sudo():
        raise Failure(
            f"{program}: machines need root: run it as root, or allow this user sudo without a"
            " password"
        )
    os.execvp("sudo", command)


def _may_sudo() -> bool:
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    try:
        pid = os.posix_spawnp("sudo", ["sudo", "-n", "true"], os.environ, file_actions=quiet)
    except OSError:
        return False
    return os.waitpid(pid, 0)[1] == 0


def main() -> int:
    _open_streams()
    os.umask(0o022)  # the caller's own would reach into the machines
    program, words = program_name(sys.argv[0]), sys.argv[1:]
    call = None
    try:
        if os.geteuid() != 0:
            return _through_sudo(program, words)
        end_with_sudo()
        if any(os.environ.get(f"ORBCTL_SIMULATOR_{name}") for name in ("LOG", "FAULTS", "BANNER")):
            from .calls import Call

            call = Call([program, *words])
            return call.carry_out(lambda: dispatch(program, words, call))
        code = dispatch(program, words, call)
        sys.stdout.flush()
        return code
    except Failure as failure:
        sys.stdout.flush()
        sys.stderr.write(f"{failure}\n")
        return failure.code
    except BrokenPipeError:
        os._exit(141)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
