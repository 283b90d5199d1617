"""
Read OrbStack's machines, settings and version.

These facts call ``orbctl`` on the target host: ``@local`` on a Mac, or a Mac that pyinfra reaches
over SSH. They look for it on PATH and in the directories that OrbStack and Homebrew use.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any, TypeVar, Union

from pyinfra.api.exceptions import FactError, FactValueError
from pyinfra.api.facts import FactBase
from typing_extensions import TypedDict, override

from pyinfra_orbstack import asking, orbctl, shelltext, specification

try:
    from pyinfra.api.exceptions import FactProcessError
except ImportError:  # pragma: no cover: before pyinfra 3.6, every error of a fact ends the run
    FactProcessError = FactError  # type: ignore[misc, assignment]

T = TypeVar("T")
#: The types of a setting.
Setting = Union[bool, int, str]


class MachineData(TypedDict):
    """One machine. Where OrbStack omits a value, text is empty and anything else is ``None``.

    + id: its id, which it keeps when it is renamed
    + name: its name
    + state: ``running``, ``stopped`` or a state in between, such as ``starting``
    + distro: its distribution, such as ``ubuntu``
    + version: version of the distribution, such as ``noble``
    + arch: ``arm64`` or ``amd64``
    + variant: variant of the image
    + username: its default user
    + isolated: whether it shares nothing with the Mac
    + isolate_network: whether access to other machines and the Mac is blocked
    + forward_ssh_agent: whether it may use the Mac's SSH agent
    + ip4: its IPv4 address, if it runs
    + ip6: its IPv6 address, if it runs
    + domain: its domain name, such as ``web.orb.local``
    + created: when it was created

    **Example:**

    .. code:: python

        machines = host.get_fact(OrbStackMachines)
        running = [one["name"] for one in machines.values() if one["state"] == "running"]
    """

    id: str
    name: str
    state: str
    distro: str
    version: str
    arch: str
    variant: str
    username: str
    isolated: bool | None
    isolate_network: bool | None
    forward_ssh_agent: bool | None
    ip4: str | None
    ip6: str | None
    domain: str
    created: datetime | None


def _describe(machine: orbctl.Machine, addresses: orbctl.Machine | None = None) -> MachineData:
    config = machine.record.get("config") or {}
    addresses = addresses or machine

    def switch(key: str) -> bool | None:
        return config[key] if isinstance(config.get(key), bool) else None

    return {
        "id": machine.id,
        "name": machine.name,
        "state": machine.state,
        "distro": machine.distro,
        "version": machine.version,
        "arch": machine.arch,
        "variant": machine.variant,
        "username": machine.username,
        "isolated": machine.isolated,
        "isolate_network": switch("isolate_network"),
        "forward_ssh_agent": switch("forward_ssh_agent"),
        "ip4": addresses.ip4,
        "ip6": addresses.ip6,
        "domain": machine.domain,
        "created": machine.created,
    }


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except orbctl.BadValue as bad:
        raise FactValueError(str(bad)) from None


class _OrbctlFact(FactBase[T]):
    """A fact read from `orbctl`. It is None if that failed; the host has then failed too."""

    # The commands are written for sh, whatever shell the user has chosen.
    shell_executable = "sh"

    @override
    def process(self, output: list[str]) -> T:
        try:
            return self.read(output)
        except orbctl.OrbctlError as failed:
            raise FactProcessError(str(failed)) from None

    def read(self, output: list[str]) -> T:
        """Turn the command's output into the fact."""
        raise NotImplementedError


class OrbStackMachines(_OrbctlFact[dict[str, MachineData]]):
    """
    Returns OrbStack's machines by name, without its internal ones, ``docker`` and ``k8s``.

    + addresses: whether to read each running machine's addresses, at the cost of one call each

    **Example:**

    .. code:: python

        {
            "web": {
                "id": "01KHVDCW7HTAGRPMB823KADP9B",
                "name": "web",
                "state": "running",
                "distro": "ubuntu",
                "version": "noble",
                "arch": "arm64",
                "variant": "default",
                "username": "alice",
                "isolated": False,
                "isolate_network": False,
                "forward_ssh_agent": True,
                "ip4": "192.168.139.64",
                "ip6": "fd07:b51a:cc66:0:b476:dbff:fe73:161e",
                "domain": "web.orb.local",
                "created": datetime(2026, 2, 19, 16, 58, 11, 57000, tzinfo=timezone.utc),
            },
        }
    """

    @override
    def command(self, addresses: bool = True) -> str:
        return asking.telling("ask_all") if addresses else asking.ask("list", "--format", "json")

    @override
    def read(self, output: list[str]) -> dict[str, MachineData]:
        listing, *infos = asking.answers(output)
        addresses = {}
        for text in infos:
            with contextlib.suppress(orbctl.BadAnswer):
                machine = orbctl.parse_info(text)
                addresses[machine.id] = machine
        return {
            machine.name: _describe(machine, addresses.get(machine.id))
            for machine in orbctl.parse_list(listing)
        }


class OrbStackMachine(_OrbctlFact[Union[MachineData, dict[str, Any]]]):
    """
    Returns one machine as ``OrbStackMachines`` does, or ``{}`` if it does not exist.

    + machine: name of the machine

    **Example:**

    .. code:: python

        web = host.get_fact(OrbStackMachine, machine="web")
        print(web["ip4"])
    """

    @override
    def command(self, machine: str) -> str:
        with _refusing():
            return asking.ask(*orbctl.info_args(machine))

    @override
    def read(self, output: list[str]) -> MachineData | dict[str, Any]:
        try:
            return _describe(orbctl.parse_info(asking.answer(output)))
        except orbctl.MachineNotFound:
            return {}


class SettledMachine(OrbStackMachine):
    """
    Returns one machine as ``OrbStackMachine`` does, once OrbStack is no longer busy with it.

    + machine: name of the machine
    + seconds: how long to wait
    """

    @override
    def command(self, machine: str, seconds: int) -> str:  # type: ignore[override]
        with _refusing():
            words = shelltext.words("ask_when_settled", orbctl.check_name(machine), seconds)
        return asking.telling(words)


class OrbStackMachineLogs(_OrbctlFact[list[str]]):
    """
    Returns the lines of a machine's console log.

    + machine: name of the machine
    + all_logs: whether to include OrbStack's own log messages about it

    **Example:**

    .. code:: python

        lines = host.get_fact(OrbStackMachineLogs, machine="web")
    """

    @override
    def command(self, machine: str, all_logs: bool = False) -> str:
        with _refusing():
            return asking.ask(*orbctl.machine_args("logs --all" if all_logs else "logs", machine))

    @override
    def read(self, output: list[str]) -> list[str]:
        return asking.answer(output).splitlines()


class OrbStackConfig(_OrbctlFact[dict[str, Setting]]):
    """
    Returns OrbStack's settings, as ``bool``, ``int`` or ``str``.

    **Example:**

    .. code:: python

        {
            "cpu": 11,
            "memory_mib": 16384,
            "network.subnet4": "192.168.138.0/23",
            "rosetta": True,
            "machine.web.username": "alice",
        }
    """

    @override
    def command(self) -> str:
        return asking.ask("config", "show")

    @override
    def read(self, output: list[str]) -> dict[str, Setting]:
        return orbctl.parse_config(asking.answer(output))


class OrbStackConfigValue(_OrbctlFact[str]):
    """
    Returns one setting as OrbStack prints it, or ``""`` if it is not set.

    + key: name of the setting

    **Example:**

    .. code:: python

        memory = int(host.get_fact(OrbStackConfigValue, key="memory_mib"))
    """

    @override
    def command(self, key: str) -> str:
        with _refusing():
            return asking.ask(*orbctl.config_args(key))

    @override
    def read(self, output: list[str]) -> str:
        return orbctl.parse_value(asking.answer(output))


class OrbStackVersion(_OrbctlFact[str]):
    """
    Returns OrbStack's version, such as ``2.2.3``.

    **Example:**

    .. code:: python

        major = int(host.get_fact(OrbStackVersion).split(".")[0])
    """

    @override
    def command(self) -> str:
        return asking.ask("version")

    @override
    def read(self, output: list[str]) -> str:
        return orbctl.parse_version(asking.answer(output))


class OrbStackStatus(_OrbctlFact[str]):
    """
    Returns ``running``, ``starting`` or ``stopped``; asking does not start OrbStack.

    **Example:**

    .. code:: python

        if host.get_fact(OrbStackStatus) == "running":
            machines = host.get_fact(OrbStackMachines)
    """

    @override
    def command(self) -> str:
        return asking.ask("status")

    @override
    def read(self, output: list[str]) -> str:
        return orbctl.parse_status(asking.answers(output, whole=True, accept=(1, 2))[0])


class OrbStackDefaultMachine(_OrbctlFact[str]):
    """
    Returns the name of the machine that ``orb`` uses by default, or ``""`` if there is none.

    **Example:**

    .. code:: python

        default = host.get_fact(OrbStackDefaultMachine)
    """

    @override
    def command(self) -> str:
        return asking.ask("default")

    @override
    def read(self, output: list[str]) -> str:
        name = orbctl.parse_value(asking.answer(output))
        return "" if name == "none" else name


class OrbStackSSH(_OrbctlFact[dict[str, Setting]]):
    """
    Returns how to reach OrbStack's SSH server. It includes the path of a key, never a key itself.

    **Example:**

    .. code:: python

        {"host": "127.0.0.1", "port": 32222}
    """

    @override
    def command(self) -> str:
        return asking.ask("ssh")

    @override
    def read(self, output: list[str]) -> dict[str, Setting]:
        return orbctl.parse_ssh(asking.answer(output))


class CloudInitDigest(_OrbctlFact[str]):
    """
    Returns the SHA-256 of the cloud-init file that created a machine, or ``""`` if unknown. It is
    followed by `` pending`` until a deploy has seen cloud-init succeed.

    ``orbstack.machine`` records it by machine id on the OrbStack host, because reading it from the
    machine itself would require the machine to run.

    + machine_id: id of the machine
    """

    @override
    def command(self, machine_id: str) -> str:
        with _refusing():
            return shelltext.command(shelltext.words("digest_of", orbctl.check_id(machine_id)))

    @override
    def read(self, output: list[str]) -> str:
        match = re.fullmatch(r"[0-9a-f]{64}( pending)?", output[0])
        return match[0] if match else ""


class PathKind(_OrbctlFact[str]):
    """
    Returns ``file``, ``directory`` or ``absent``; the path may contain any characters.

    + path: path to check
    """

    @override
    def command(self, path: str) -> str:
        with _refusing():
            word = shelltext.mac_path(specification.mac_path("path", path))
        return shelltext.command(f"kind_of {word}")

    @override
    def read(self, output: list[str]) -> str:
        return output[-1]
