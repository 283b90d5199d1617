"""Creating a machine: it is recorded or removed, whatever interrupts this process.

A separate shell does the work, with the functions that operations also use: shell/machines.sh.
Nothing that happens to this process kills it. When told to give up, it gives `orbctl` a moment to
end by itself, and then removes what it has created.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Sequence

import gevent

from pyinfra_orbstack import orbctl, process, shell, shelltext
from pyinfra_orbstack.answers import (
    BadAnswer,
    Machine,
    OrbctlError,
    error_of,
    parse_info,
    plain_lines,
)
from pyinfra_orbstack.places import PLACE_VARIABLE
from pyinfra_orbstack.record import RECORD_VARIABLE, Record, place_of

#: Maximum seconds to remove a created machine, or to say why it cannot be removed.
CLEAN_UP = 60.0


class Making:
    """A machine that is being created.

    The caller passes `give_up` to `interrupts.at_interrupt`, and calls `undo` if anything fails.

    Args:
        client: The `orbctl` that creates it.
        name: Its future name.
        args: The arguments of `orbctl`.
        record: The record to add it to.
    """

    def __init__(
        self, client: orbctl.Orbctl, name: str, args: Sequence[str], record: Record | None
    ) -> None:
        self._client, self._name, self._args = client, name, args
        self._env = client.environment()
        client.place.open()
        self._env[orbctl.COMMAND_VARIABLE] = self._executable
        self._env.pop(PLACE_VARIABLE, None)
        if client.place.far:
            self._env[PLACE_VARIABLE] = place_of(client)
        self._env[RECORD_VARIABLE] = str(record.path) if record else ""
        # Its last output is the status, since pyinfra's @local may take the exit status from us.
        call = f'{shelltext.words("make_machine", name, *args)}; echo "status $? $found"'
        argv = client.place.holding(["sh", "-c", shelltext.command(call)])
        self._child = process.Child(argv, env=self._env)
        self._reader = gevent.spawn(self._read)
        self._killer: process.Detached | None = None
        self._removal: process.Detached | None = None
        #: The machine's id, once it is created and recorded.
        self._id = ""
        self._told = False

    @property
    def _executable(self) -> str:
        return self._client.place.executable(self._client.command)

    def _read(self) -> tuple[int, list[str], str]:
        """Read to the end: the status, the messages, and the description of the machine."""
        self._child.close_stdin()
        said = {process.STDOUT: bytearray(), process.STDERR: bytearray()}
        left = set(said)
        while left:
            stream, data = self._child.read()
            said[stream] += data
            if not data:
                left.discard(stream)
        # A shell that was killed prints no status.
        text = said[process.STDOUT].decode(errors="replace")
        end = re.search(r"^status (\d{1,3}) ?(\w*)\n\Z", text, re.MULTILINE)
        if end is None:
            status = 1
        else:
            status, text = int(end[1]), text[: end.start()]
            self._id = end[2] if status == 0 else ""
        self._child.end()
        return status, plain_lines(said[process.STDERR].decode(errors="replace")), text

    def give_up(self) -> None:
        """Have it removed; a signal handler may call this, and more than once."""
        if self._id:
            if self._removal is None:
                remove = shelltext.command(shelltext.words("remove", self._name, self._id))
                # The connection to a Mac may be a new one by now.
                self._env[orbctl.COMMAND_VARIABLE] = self._executable
                argv = self._client.place.holding(["sh", "-c", remove])
                self._removal = process.Detached(argv, env=self._env)
        elif self._killer is None and not self._reader.ready():
            moment = ["/bin/sh", "-c", shell.text("moment"), "sh", str(self._child.pid)]
            self._killer = process.Detached(moment)
            os.kill(self._child.pid, signal.SIGTERM)

    def finish(self, timeout: float, tell: Callable[[str], object]) -> Machine:
        """Wait until the machine is created and recorded.

        Args:
            timeout: Seconds that `orbctl` may take.
            tell: Called with each message other than the error that is raised.

        Raises:
            MachineExists: A machine of that name already exists.
            OrbctlError: It failed, or took too long; the message names a machine that is left.
        """
        late = gevent.spawn_later(timeout, self.give_up)
        try:
            status, said, told = self._reader.get()
        finally:
            took_too_long = late.ready()
            late.kill()
        self._told = True
        if status == 0:
            for line in said:
                tell(line)
            with contextlib.suppress(BadAnswer):
                return parse_info(told)
            return Machine(self._id, self._name, "unknown")
        problem = error_of("\n".join(said), status)
        for line in said:
            if str(problem) not in line or took_too_long:
                tell(line)
        if took_too_long:
            raise OrbctlError(
                f"orbctl {self._args[0]} did not answer in {timeout:g} s: try `orbctl status`"
            )
        raise problem

    def undo(self, tell: Callable[[str], object]) -> None:
        """Remove the machine, unless it was never created; report one that cannot be removed."""
        if not self._id:
            self.give_up()
            if not self._told:
                with contextlib.suppress(OSError, gevent.Timeout):
                    for line in self._reader.get(timeout=CLEAN_UP)[1]:
                        tell(line)
        if self._killer is not None:
            with contextlib.suppress(OSError):
                self._killer.result(CLEAN_UP)
        # It may have been created at the last moment.
        if self._id and (reason := self._why_not_removed()):
            tell(
                f"machine {self._name} was created, but is unusable, and deleting it failed: "
                f"{reason}; to delete it, run: "
                f"{self._client.line(['delete', '--force', self._name])}"
            )

    def _why_not_removed(self) -> str:
        """Remove the machine, and return why that failed, or nothing."""
        try:
            if self._removal is None:
                # The connection may have been lost while the machine booted.
                self._client.place.open()
                self.give_up()
        except OSError as broken:
            # A signal may have begun it meanwhile.
            if self._removal is None:
                return str(broken)
        assert self._removal is not None
        try:
            done = self._removal.result(CLEAN_UP)
        except (OSError, TimeoutError) as broken:
            return str(broken) or f"it took more than {CLEAN_UP:g} s"
        failed = error_of(done.stderr.decode(errors="replace"), done.returncode)
        return str(failed) if done.returncode else ""
