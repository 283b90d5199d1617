"""The record: the machines that runs have created, so that only those are ever deleted.

A text file with a name and an id on each line. From before a machine is created until its id is
known, another kind of line takes its place, an intent:

    NAME ? SINCE - WRITER PLACE        `orbctl` is being asked to create it
    NAME ! SINCE UNTIL WRITER PLACE    it has created it, and the id is not written yet

SINCE and UNTIL are seconds of the epoch, WRITER begins with the writer's process id, and PLACE
identifies the `orbctl` that was asked. Beside the file, RECORD.orbctl contains the PLACE of each
id: a machine that is not listed is gone only if the `orbctl` that created it says so.

shell/record.sh writes the same files, on the target host of the operations. Both take RECORD.lock
for it, a symlink that names its holder, and replace a file as a whole.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import gevent

from pyinfra_orbstack.answers import BadValue, Machine, OrbctlError, OrbctlMissing
from pyinfra_orbstack.arguments import check_id, check_name

if TYPE_CHECKING:
    from pyinfra_orbstack.orbctl import Orbctl

#: Names a file that collects the names and ids of created machines.
RECORD_VARIABLE = "PYINFRA_ORBSTACK_RECORD"

#: Seconds after which a lock counts as abandoned: it is held for some milliseconds.
LOCK_AGE = 60.0
#: Seconds to wait for a lock; long enough for an abandoned one to be removed.
LOCK_TIMEOUT = 90.0
#: Seconds within which an `orbctl` whose caller is gone lists the machine that it creates.
SHOWN = 10.0
#: Seconds by which the clock of OrbStack's machines, which ids contain, may be behind ours.
SKEW = 10.0
#: Seconds after which an intent's writer is certainly done, whichever process has its id by then.
MAKING = 3600.0

#: The first word of a PLACE that ssh reaches; other places begin with a path.
FAR = "ssh"

_serial = itertools.count()


class RecordError(OrbctlError, OSError):
    """The record cannot be read or written; the text is one line."""


class NotDeleted(OrbctlError):
    """Machines of the record that were not deleted, each with its reason.

    Attributes:
        deleted: Names of those that were deleted.
    """

    def __init__(self, problems: Iterable[str], deleted: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.deleted = deleted


class Intent(NamedTuple):
    """A machine that a process was about to create, and whose id was not recorded."""

    name: str
    since: int
    until: int | None
    writer: str
    place: str
    line: str

    @property
    def alive(self) -> bool:
        """Whether its writer may still be creating it."""
        return not _gone(self.writer) and time.time() - self.since < MAKING

    def may_be(self, machine: Machine) -> bool:
        """Whether a machine of that name can be the intended one, or is older."""
        return machine.created is None or machine.created.timestamp() >= self.since - SKEW

    def is_certainly(self, machine: Machine) -> bool:
        """Whether the machine was created while `orbctl` created one of that name, then free."""
        if self.until is None or machine.created is None:
            return False
        return self.since <= machine.created.timestamp() <= self.until + 1


class Record:
    """The machines that runs have created, and those that they were about to create.

    Before deleting a machine, look for its id, as it may have been renamed, and compare the id with
    what `orbctl info` reports for its name. Every method raises `RecordError` if the file cannot
    be read or written.

    Args:
        path: The file; it need not exist. A symlink is followed, and remains one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def from_environment(cls) -> Record | None:
        """The record that `PYINFRA_ORBSTACK_RECORD` names, or None."""
        path = os.environ.get(RECORD_VARIABLE)
        return cls(path) if path else None

    # Reading

    def _entries(self) -> list[tuple[str, str]]:
        split = (line.split() for line in _lines(self.path))
        return [(words[0], words[1]) for words in split if _is_machine(words)]

    def machines(self) -> dict[str, str]:
        """Ids by the names with which the machines were created."""
        return dict(self._entries())

    def names(self) -> dict[str, str]:
        """The names with which the machines were created, by their ids."""
        return {machine_id: name for name, machine_id in self._entries()}

    def places(self) -> tuple[list[str], bool]:
        """Where machines were created: destinations of ssh, and whether any is on this host."""
        made = dict(line.partition(" ")[::2] for line in _lines(_beside(self.path)))
        places = [made.get(machine_id, "") for _, machine_id in self._entries()]
        places += [one.place for one in self.intents()]
        far = [one[len(FAR) + 1 :] for one in places if one.startswith(f"{FAR} ")]
        return list(dict.fromkeys(far)), len(far) < len(places)

    def lines_of(self, orbctl: Orbctl) -> list[str]:
        """The lines of machines that an `orbctl` has created, or was about to create."""
        place = place_of(orbctl)
        beside = set(_lines(_beside(self.path)))
        made = [one for one in self._entries() if f"{one[1]} {place}" in beside]
        begun = [one.line for one in self.intents() if one.place == place]
        return [" ".join(one) for one in made] + begun

    def intents(self) -> list[Intent]:
        """Machines that a process is about to create, or was when it stopped writing."""
        return [found for line in _lines(self.path) if (found := _intent(line))]

    def existing(self, orbctl: Orbctl) -> list[Machine]:
        """Recorded machines that still exist, whatever their current names."""
        ids = self.names()
        return [machine for machine in orbctl.machines() if machine.id in ids] if ids else []

    def _is_gone(self, machine_id: str, place: str) -> bool:
        """Whether an unlisted machine was created by this `orbctl`, and so is gone."""
        return f"{machine_id} {place}" in _lines(_beside(self.path))

    # Writing

    def add(self, machine: Machine, orbctl: Orbctl | None = None) -> None:
        """Record a machine and the `orbctl` that created it, by default the usual one."""
        with contextlib.suppress(OrbctlMissing):
            orbctl = orbctl or _usual()
        with self.held() as write:
            if orbctl is not None:
                made = f"{machine.id} {place_of(orbctl)}"
                write(_beside(self.path), lambda lines: [*lines, made])
            write(
                self.path,
                lambda lines: [
                    *(line for line in lines if not _is_intent(line, machine.name)),
                    f"{machine.name} {machine.id}",
                ],
            )

    def forget(self, *machine_ids: str) -> None:
        """Remove machines from the record."""
        one_of = "|".join(map(re.escape, machine_ids)) or "$."
        named, told = re.compile(one_of).search, re.compile(rf"\S+\s+({one_of})\s*").fullmatch
        made = re.compile(rf"({one_of})\s").match
        # The first check is fast, and rules out nearly all lines.
        self._take_out(lambda line: bool(named(line) and told(line)), lambda line: bool(made(line)))

    def _take_out(
        self, unwanted: Callable[[str], bool], beside: Callable[[str], bool] = lambda line: False
    ) -> None:
        try:
            os.stat(self.path)
        except FileNotFoundError:
            return
        except OSError as broken:
            raise RecordError(f"cannot read the record {self.path}: {broken.strerror}") from None
        with self.held() as write:
            write(self.path, lambda lines: [line for line in lines if not unwanted(line)])
            write(_beside(self.path), lambda lines: [line for line in lines if not beside(line)])

    @contextlib.contextmanager
    def held(self) -> Iterator[Callable[[Path, Callable[[list[str]], list[str]]], None]]:
        """Hold the record's lock; yields a function that rewrites a file."""
        file = os.path.realpath(self.path)
        try:
            os.makedirs(os.path.dirname(file), exist_ok=True)
            with contextlib.ExitStack() as stack:
                # Only the next in line waits for the lock itself, however often others take it.
                with _lock(f"{file}.next"):
                    token = stack.enter_context(_lock(f"{file}.lock"))

                def write(path: Path, change: Callable[[list[str]], list[str]]) -> None:
                    before = _lines(path)
                    after = change(before)
                    if after != before:
                        _replace(os.path.realpath(path), after, f"{file}.lock", token)

                yield write
        except RecordError:
            raise
        except OSError as broken:
            raise RecordError(f"cannot write the record {self.path}: {broken.strerror}") from None

    # Unfinished and deleted machines

    def settle(
        self,
        orbctl: Orbctl,
        *,
        only: str | None = None,
        names_are_ours: bool = False,
        asked: Collection[str] = (),
    ) -> list[str]:
        """Resolve the intents that no process confirms any more.

        A machine that is proven to come from an intent is recorded. One that may come from it is
        named in the result, with the command that deletes it, and its intent remains.

        Args:
            orbctl: The `orbctl` that manages the machines.
            only: A name; intents of other names are ignored.
            names_are_ours: The names are such that nothing else gives them to a machine.
            asked: Places whose `orbctl` is asked as well; their intents are left to it.
        """
        intents = [one for one in self.intents() if only in (None, one.name)]
        dead = [one for one in intents if not one.alive]
        said = [
            f"{one.name} is being created by {_process(one.writer)}: wait for it"
            for one in set(intents) - set(dead)
        ]
        if not dead:
            return said
        place = place_of(orbctl)
        listed = {machine.name: machine for machine in orbctl.machines()}
        unseen = [one.since for one in dead if one.name not in listed and one.place == place]
        left = max(unseen, default=0) + SHOWN - time.time()
        if left > 0:
            # An `orbctl` that the dead writer called may still be about to begin.
            gevent.sleep(min(left, SHOWN))
            listed = {machine.name: machine for machine in orbctl.machines()}
        known, over = self.names(), set()
        for intent in dead:
            machine = listed.get(intent.name)
            if intent.place != place and intent.place in asked:
                continue
            if intent.place != place:
                said.append(
                    f"{intent.name} may have been created by another orbctl, or for another user "
                    f"({intent.place}): use that one to delete it"
                )
            elif (
                machine is None
                or machine.id in known
                or not (names_are_ours or intent.may_be(machine))
            ):
                over.add(intent.line)
            elif names_are_ours or intent.is_certainly(machine):
                self.add(machine, orbctl)
            else:
                said.append(
                    f"{intent.name} ({machine.id}) may come from a run that was killed; "
                    f"to delete it, run: {orbctl.line(['delete', '--force', intent.name])}"
                )
        if over:
            self._take_out(over.__contains__)
        return said

    def delete(self, machines: Iterable[Machine], orbctl: Orbctl) -> tuple[list[str], list[str]]:
        """Delete machines one by one, even if some fail, and forget each that is gone.

        Returns:
            The names of deleted machines, and a line for each failure.
        """
        deleted, problems = [], []
        for machine in machines:
            try:
                if orbctl.remove(machine):
                    deleted.append(machine.name)
                self.forget(machine.id)
            except RecordError as problem:
                problems.append(f"{machine.name} was deleted, but {problem}")
            except OrbctlError as problem:
                problems.append(f"{machine.name} was not deleted: {problem}")
        return deleted, problems

    def delete_all(self, orbctl: Orbctl, *, names_are_ours: bool = False) -> list[str]:
        """Delete every recorded machine that is still the one that was created.

        Each is tried, and forgotten once it is certainly gone.

        Returns:
            The names of deleted machines.

        Raises:
            NotDeleted: Some were not deleted; the message names each, with the reason.
        """
        problems = self.settle(orbctl, names_are_ours=names_are_ours) if self.intents() else []
        # Read before the machines are listed: entries added meanwhile are not forgotten.
        entries = self.names()
        listed = {machine.id: machine for machine in orbctl.machines()} if entries else {}
        there = [listed[machine_id] for machine_id in entries if machine_id in listed]
        deleted, failed = self.delete(there, orbctl)
        problems += failed
        place, gone, unknown = place_of(orbctl), [], []
        for machine_id, name in entries.items():
            if machine_id in listed:
                continue
            if self._is_gone(machine_id, place):
                gone.append(machine_id)
            # If the entry is gone, another process has finished deleting the machine.
            elif (name, machine_id) in self._entries():
                unknown.append(name)
        if gone:
            self.forget(*gone)
        if unknown:
            problems.append(
                f"{orbctl.command} does not list {', '.join(unknown)}, which another orbctl may "
                f"have created; if this no longer exists, remove its line from {self.path}"
            )
        if problems:
            raise NotDeleted(problems, deleted)
        return deleted


# Lines ------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    """The complete lines of a file, which need not exist; any bytes survive rewriting."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            text = file.read()
    except FileNotFoundError:
        return []
    except OSError as broken:
        raise RecordError(f"cannot read the record {path}: {broken.strerror}") from None
    return [line for line in text.split("\n") if line]


def _beside(path: Path) -> Path:
    return Path(f"{os.path.realpath(path)}.orbctl")


def _is_machine(words: Sequence[str]) -> bool:
    """Whether a line contains a name and an id; truncated or invented lines do not."""
    try:
        return len(words) == 2 and bool(check_name(words[0]) and check_id(words[1]))
    except BadValue:
        return False


def _is_intent(line: str, name: str) -> bool:
    intent = _intent(line)
    return intent is not None and intent.name == name


def _intent(line: str) -> Intent | None:
    match = re.fullmatch(r"(\S+) [?!] (\d{1,12}) (-|\d{1,12}) ([0-9.]+) (.*)", line)
    if match is None or not _is_machine([match[1], "0"]):
        return None
    until = None if match[3] == "-" else int(match[3])
    return Intent(match[1], int(match[2]), until, match[4], match[5], line)


def _usual() -> Orbctl:
    from pyinfra_orbstack.orbctl import Orbctl

    return Orbctl()


def place_of(orbctl: Orbctl) -> str:
    """The set of machines of an `orbctl`: its path, its owner, and the simulator's directory.

    That of a Mac that ssh reaches is its destination.
    """
    if orbctl.place.far:
        return f"{FAR} {orbctl.place.name}"
    env = orbctl.environment()
    simulator = env.get("ORBCTL_SIMULATOR_HOME") or env.get("XDG_STATE_HOME") or ""
    command = os.path.join(os.getcwd(), orbctl.command)
    return " ".join((command, env["HOME"], simulator)).replace("\n", " ").strip()


# The lock ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _lock(path: str) -> Iterator[str]:
    """Hold a lock, a symlink that names its holder; only its greenlet waits.

    A lock whose holder is gone is removed under a lock of its own, which is named after the holder:
    so no process removes a lock that a third one has taken meanwhile.
    """
    token = f"{os.getpid()}.{time.time_ns()}.{next(_serial)}"
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            os.symlink(token, path)
            break
        except FileExistsError:
            holder = _holder(path)
        if holder and (_gone(holder) or _is_old(path)):
            with _lock(f"{path}.{re.sub('[^0-9.]', '', holder)}"):
                if _holder(path) == holder:
                    os.unlink(path)
        elif time.monotonic() > deadline:
            raise RecordError(f"{path} is held by {_process(holder)}; if that is wrong, remove it")
        else:
            gevent.sleep(0.02)
    try:
        yield token
    finally:
        if _holder(path) == token:
            os.unlink(path)


def _holder(path: str) -> str:
    """The holder that a lock names; empty if it is free."""
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""


def _process(writer: str) -> str:
    return f"process {writer.partition('.')[0]}"


def _gone(writer: str) -> bool:
    """Whether the process that a lock or an intent names has certainly ended."""
    pid = writer.partition(".")[0]
    if not pid.isdecimal() or not int(pid):
        return False
    try:
        os.kill(int(pid), 0)
        # A zombie remains in the list of processes.
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] == b"Z"
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False


def _is_old(path: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - os.lstat(path).st_mtime > LOCK_AGE
    return False


def _replace(file: str, lines: Sequence[str], lock: str, token: str) -> None:
    """Make these lines the whole content of a file, atomically, if the lock is still ours."""
    # Files of killed writers; a writer that was only suspended fails then, as it should.
    for left in glob.glob(f"{glob.escape(file)}.new.*"):
        os.unlink(left)
    new = f"{file}.new.{token}"
    try:
        with open(new, "x", encoding="utf-8", errors="surrogateescape", newline="\n") as out:
            with contextlib.suppress(FileNotFoundError):
                before = os.stat(file)
                os.fchmod(out.fileno(), before.st_mode & 0o7777)
                with contextlib.suppress(PermissionError):
                    os.fchown(out.fileno(), before.st_uid, before.st_gid)
            out.write("".join([f"{line}\n" for line in lines]))
            out.flush()
            os.fsync(out.fileno())
        if _holder(lock) != token:
            raise RecordError(f"{lock} was removed, so nothing was written: try again")
        os.replace(new, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    folder = os.open(os.path.dirname(file), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
