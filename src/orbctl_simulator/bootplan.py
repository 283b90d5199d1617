"""What a supervisor should boot."""

from __future__ import annotations

import os
import stat

from . import guest, userns
from .shares import is_of_boot, open_source
from .state import Failure


class Share:
    """A file or directory of the host that is mounted in the machine."""

    def __init__(self, source: str, target: str) -> None:
        self.source, self.target = source, target
        self._tree, self._is_directory = -1, True

    def open(self, first_id: int) -> None:
        try:
            source = open_source(self.source)
            status = os.fstat(source)
            space = userns.of_share(first_id, status.st_uid, status.st_gid, guest.USER_ID)
            flags = userns.NO_SUID | userns.NO_DEVICES
            self._tree = userns.copy_of_mount(source, space, flags)
            self._is_directory = stat.S_ISDIR(status.st_mode)
            os.close(space)
            os.close(source)
        except OSError as error:
            raise self._failed(error) from None

    def find_target(self) -> None:
        """Resolve the links on its path, in the machine's own files."""
        self.target = os.path.realpath(self.target)
        if is_of_boot(self.target):
            raise Failure(
                f"mount {self.source} on {self.target}: the machine mounts or empties this"
                " directory when it boots: choose another target"
            )

    def make_target(self) -> None:
        """Create the mount point in the machine's own files."""
        try:
            if self._is_directory:
                os.makedirs(self.target, mode=0o755, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(self.target), mode=0o755, exist_ok=True)
                os.close(os.open(self.target, os.O_CREAT | os.O_RDONLY | os.O_NONBLOCK, 0o644))
        except OSError as error:
            raise self._failed(error) from None

    def attach(self) -> None:
        try:
            userns.put_mount(self._tree, self.target)
        except OSError as error:
            raise self._failed(error) from None
        finally:
            os.close(self._tree)

    def _failed(self, error: OSError) -> OSError:
        return OSError(f"mount {self.source} on {self.target}: {os.strerror(error.errno or 0)}")


class Plan:
    """A machine to boot. Paths are relative to its own directory."""

    def __init__(self, machine_id: str, words: list[str]) -> None:
        """`words` are those of `booted.Start.boot`."""
        self.id = machine_id
        self.fields: dict[str, str] = {}
        self.first_id = 0
        self.is_first_boot = False
        #: What its clock shows when it boots; None is the host's clock.
        self.clock: float | None = None
        how, self.files, self.state, self.cache, count, *rest = words
        #: Whether its files have never been set up.
        self.is_new = how == "create"
        #: Root file systems, the uppermost first.
        self.lowers = rest[: int(count)]
        told = iter(rest[int(count) :])
        self.shares = [Share(source, target) for source, target in zip(told, told)]

    @property
    def name(self) -> str:
        return self.fields["name"]

    @property
    def has_cloud_init(self) -> bool:
        """Whether it is up before its init has finished, as cloud-init may take long or fail."""
        return self.fields.get("cloud_init") == "true"

    @property
    def hidden(self) -> tuple[str, str]:
        """Directories of the host that no machine may see, if its image is the host's root."""
        return self.state, self.cache
