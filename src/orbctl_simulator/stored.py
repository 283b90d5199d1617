"""Files of booted machines on the host's disk, where they have ids that no user of the host has."""

from __future__ import annotations

import os

from .linux import CLONE_NEWNS, MS_PRIVATE, MS_REC, end_with_parent, mount, unshare
from .state import Failure, why

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def give_to_root(path: str, folder: int | None = None) -> None:
    """Make the machine's root the owner of a directory that this process has just created."""
    from . import userns  # slow to load, and not needed for machines without init

    os.chown(path, userns.STORED, userns.STORED, dir_fd=folder, follow_symlinks=False)


def with_plain_owners(path: str, work: Callable[[], None]) -> None:
    """Run `work` in a child that sees the files in `path` with the owners they have in a machine.

    Archives and copies then contain plain ids, while the disk has stored ones.
    """
    from . import userns

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "was killed"
        try:
            end_with_parent()  # otherwise it would keep the lock, and the machine frozen
            line = f"{userns.STORED} 0 {userns.SPAN}\n"
            space = userns.make(line, line)
            unshare(CLONE_NEWNS)
            mount(None, "/", None, MS_REC | MS_PRIVATE)
            userns.put_mount(userns.copy_of_mount(path, space), path)
            work()
            text = ""
        except OSError as error:
            text = f"{error.filename}: {why(error).lower()}" if error.filename else why(error)
        except BaseException as error:
            text = str(error) or type(error).__name__
        finally:
            os.write(writer, text.encode(errors="surrogateescape"))
            os._exit(1 if text else 0)
    os.close(writer)
    with open(reader, errors="surrogateescape") as file:
        text = file.read()
    if os.waitpid(pid, 0)[1] != 0:
        raise Failure(text or "its files could not be copied: the process was killed")
