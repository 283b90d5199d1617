"""Machine specifications and host settings, checked once, before anything is done.

The keys of a host's data, the arguments of operations and the options of the pytest plugin all end
up here. In paths of the Mac, `~` is the user's home. Paths of a machine must not contain it,
because its meaning would depend on the user who runs the command.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyinfra_orbstack import arguments
from pyinfra_orbstack.answers import BadValue
from pyinfra_orbstack.arguments import (
    ARCHS,
    check_image_form,
    check_name,
    check_value,
    limits,
)
from pyinfra_orbstack.places import SSH_KEY, Place, check_destination

#: The distros that `orbctl create` supports, as of OrbStack 2.2.
DISTROS = frozenset(
    [
        *("alma", "alpine", "arch", "centos", "debian", "devuan", "fedora", "gentoo", "kali"),
        *("nixos", "openeuler", "opensuse", "oracle", "rocky", "ubuntu", "void"),
    ]
)
#: Versions that are words without a number, in addition to those that have one.
WORDS = {"debian": {"sid", "testing", "unstable"}, "devuan": {"ceres", "testing", "unstable"}}

# One value -------------------------------------------------------------------------------------
#
# Each function returns the value, or raises `BadValue` with its key.


def _text(key: str, value: Any) -> str:
    # `--data` turns digits into a number, and an id may consist of digits.
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return check_value(key, value)


def _arch(key: str, value: Any) -> str:
    if check_value(key, value) not in ARCHS:
        raise BadValue(f"{key} must be {' or '.join(ARCHS)}, not {value!r}")
    return str(value)


def _image(key: str, value: Any) -> str:
    return check_image_form(key, check_value(key, value))


def _switch(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadValue(f"{key} must be True or False, not {value!r}")
    return value


def _limit(key: str, value: Any) -> Any:
    if isinstance(value, str):
        check_value(key, value)
    kind = key.rpartition("_")[2]
    try:
        limits(**{kind: value})
    except BadValue as bad:
        raise BadValue(f"{key}{str(bad)[len(kind) :]}") from None
    return value


def _seconds(key: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise BadValue(f"{key} must be a number of seconds above 0, not {value!r}")
    return number


def mac_path(key: str, value: Any) -> str:
    """A path on the Mac, where `~` is allowed only for the user's own home."""
    path = check_value(key, value)
    if path[0] == "~" and path[1:2] not in ("", "/"):
        raise BadValue(f"{key} {path!r}: ~ works only for your own home; write the full path")
    return path


def _machine_path(key: str, value: Any) -> str:
    path = check_value(key, value)
    if path[0] != "/":
        raise BadValue(f"{key} must be an absolute path in the machine, without ~, not {path!r}")
    return path


def _mounts(key: str, value: Any) -> list[str]:
    if isinstance(value, str):
        raise BadValue(f"{key} must be a list such as [{value!r}], not text")
    if not isinstance(value, (list, tuple)):
        raise BadValue(f"{key} must be a list such as ['~/src:/src'], not {value!r}")
    for one in value:
        source, colon, target = check_value(key, one).partition(":")
        mac_path(key, source)
        if colon:
            _machine_path(key, target)
    return list(value)


def expanded(key: str, path: str) -> str:
    """A path on this host, with `~` replaced by the user's home."""
    if path[0] != "~":
        return path
    home = os.path.expanduser("~")
    if home[:1] != "/":
        raise BadValue(f"{key} {path!r}: ~ has no home directory; set HOME")
    return home + path[1:]


# The data of a host ----------------------------------------------------------------------------

PREFIX = "orbstack_"
#: The specification of a machine.
MACHINE_KEYS: dict[str, Callable[[str, Any], Any]] = {
    "orbstack_image": _image,
    "orbstack_arch": _arch,
    "orbstack_create_user": _text,
    "orbstack_cloud_init": mac_path,
    "orbstack_isolated": _switch,
    "orbstack_isolate_network": _switch,
    "orbstack_mounts": _mounts,
    "orbstack_cpus": _limit,
    "orbstack_memory": _limit,
    "orbstack_disk": _limit,
}
#: How to reach a host.
HOST_KEYS: dict[str, Callable[[str, Any], Any]] = {
    "orbstack_user": _text,
    "orbstack_workdir": _machine_path,
    "orbstack_create": _switch,
    "orbstack_start": _switch,
    "orbstack_boot_timeout": _seconds,
    "orbstack_transport": _text,
    SSH_KEY: check_destination,
}
KEYS = {**MACHINE_KEYS, **HOST_KEYS}
DEFAULTS: dict[str, Any] = {
    "orbstack_isolated": False,
    "orbstack_isolate_network": False,
    "orbstack_mounts": [],
    "orbstack_create": True,
    "orbstack_start": True,
    "orbstack_boot_timeout": 120,
}
#: Keys with our prefix that the connector itself adds to a host's data.
GIVEN = frozenset({"orbstack_vm", "orbstack_ip4", "orbstack_domain"})


def check_keys(given: Iterable[str], known: Collection[str] = KEYS) -> None:
    """Check that each key with our prefix is known.

    Raises:
        BadValue: A key is unknown; the message names the closest known one.
    """
    for key in given:
        # Other keys are the user's own, and need not even be text.
        ours = isinstance(key, str) and key.startswith(PREFIX)
        if ours and key not in known and key not in GIVEN:
            raise BadValue(f"{key} is not a key of this connector{_nearest(key, known)}")


def check_data(data: Mapping[str, Any], keys: Collection[str] = KEYS) -> dict[str, Any]:
    """The checked values of keys; None counts as absent.

    Raises:
        BadValue: A value is wrong, or two values exclude each other.
    """
    found = {}
    for key in keys:
        value = DEFAULTS.get(key)
        if key in data and data[key] is not None:
            value = data[key]
        found[key] = None if value is None else KEYS[key](key, value)
    if not found.get("orbstack_isolated"):
        for key in ("orbstack_isolate_network", "orbstack_mounts"):
            if found.get(key):
                raise BadValue(f"{key} requires orbstack_isolated")
    return found


def create_args(name: str, data: Mapping[str, Any]) -> list[str]:
    """The `orbctl` arguments that create a machine here, according to a host's data.

    Raises:
        BadValue: A value cannot work; the message names its key.
    """
    spec = MachineSpec.from_data(name, check_data(data, MACHINE_KEYS))
    spec.check_files(PREFIX)
    return spec.create_args(here=True)


def _nearest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else f" (known: {', '.join(sorted(known))})"


@dataclass(frozen=True)
class MachineSpec:
    """The specification of a machine; None leaves the choice to OrbStack.

    Raises:
        BadValue: A value cannot be right, or two values exclude each other.
    """

    name: str
    image: str | None = None
    arch: str | None = None
    user: str | None = None
    cloud_init: str | None = None
    cpus: str | float | None = None
    memory: str | float | None = None
    disk: str | float | None = None
    isolated: bool | None = None
    isolate_network: bool | None = None
    mounts: Sequence[str] | None = None
    forward_ssh_agent: bool | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        for key, check in (
            ("image", _image),
            ("arch", _arch),
            ("user", _text),
            ("cloud_init", mac_path),
            ("isolated", _switch),
            ("isolate_network", _switch),
            ("mounts", _mounts),
            ("forward_ssh_agent", _switch),
        ):
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, check(key, value))
        limits(self.cpus, self.memory, self.disk)
        self.create_args()

    @classmethod
    def from_data(cls, name: str, data: Mapping[str, Any]) -> MachineSpec:
        """The specification in a host's checked data."""
        values = {key: data[f"orbstack_{key}"] for key in _OF_DATA}
        return cls(name, user=data["orbstack_create_user"], **values)

    @property
    def settings(self) -> dict[str, str]:
        """The limits, as settings of an existing machine; 0 lifts a limit."""
        return limits(self.cpus, self.memory, self.disk)

    @property
    def limited(self) -> dict[str, Any]:
        """The limits that are set, by their names in this class."""
        names = {"cpu": "cpus", "memory_mib": "memory", "disk_bytes": "disk"}
        return {
            names[key]: getattr(self, names[key])
            for key, value in self.settings.items()
            if float(value)
        }

    def create_args(self, *, here: bool = False) -> list[str]:
        """Arguments that create the machine.

        Args:
            here: `orbctl` runs on this host, so that ``~`` is the home of the current user.
        """

        def path(what: str, path: str) -> str:
            return expanded(what, path) if here else path

        return arguments.create_args(
            self.name,
            "image" if self.image is None else self.image,
            arch=self.arch,
            user=self.user,
            cloud_init=path("cloud_init", self.cloud_init) if self.cloud_init and here else None,
            isolated=bool(self.isolated),
            isolate_network=bool(self.isolate_network),
            mounts=[path("mounts", mount) for mount in self.mounts or ()],
            # Machines that are not isolated have it anyway.
            forward_ssh_agent=bool(self.forward_ssh_agent and self.isolated),
            **self.limited,
        )

    def check_files(self, prefix: str = "", *, mounts: bool = True) -> None:
        """Check that the files that it names on this host exist.

        Args:
            prefix: Prefix of its keys in messages.
            mounts: Whether its mounts are on this host.

        Raises:
            BadValue: A file is missing.
        """
        if self.cloud_init is not None:
            path = expanded("cloud_init", self.cloud_init)
            if not os.path.isfile(path):
                raise BadValue(f"{prefix}cloud_init must be a file on this host, not {path!r}")
            read_cloud_init(path)
        for one in (self.mounts or ()) if mounts else ():
            source = expanded("mounts", one.partition(":")[0])
            if not os.path.exists(source):
                raise BadValue(f"{prefix}mounts: there is no {source!r} on this host; create it")

    def at(self, place: Place, cloud_init: str) -> MachineSpec:
        """The same for `orbctl` on a Mac, where a copy of its cloud-init file has another path."""
        mounts = self.mounts and [place.mac_path(mount) for mount in self.mounts]
        return replace(self, mounts=mounts, cloud_init=cloud_init or None)

    def unlike(self, distro: str, version: str, arch: str) -> list[str]:
        """How a machine that was just created from it differs from it."""
        said = []
        if self.image and same_image(self.image, distro, version) is False:
            said.append(f"it is {distro}:{version}, not {self.image}")
        if self.arch and arch and self.arch != arch:
            said.append(f"its arch is {arch}, not {self.arch}")
        return said


_OF_DATA = (
    *("image", "arch", "cloud_init", "cpus", "memory", "disk"),
    *("isolated", "isolate_network", "mounts"),
)


@dataclass(frozen=True)
class Settings:
    """The settings in a host's data that say how to reach it."""

    user: str | None
    workdir: str | None
    transport: str | None
    may_create: bool
    may_start: bool
    boot_timeout: float
    cloud_init: bool
    ssh: str | None

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Settings:
        """The settings in a host's checked data."""
        return cls(
            user=data["orbstack_user"],
            workdir=data["orbstack_workdir"],
            transport=data["orbstack_transport"],
            may_create=data["orbstack_create"],
            may_start=data["orbstack_start"],
            boot_timeout=data["orbstack_boot_timeout"],
            cloud_init=data["orbstack_cloud_init"] is not None,
            ssh=data[SSH_KEY],
        )


def read_cloud_init(path: str) -> str:
    """The content of a cloud-init file on this host.

    Raises:
        BadValue: It cannot be read, or is empty.
    """
    path = expanded("cloud_init", mac_path("cloud_init", path))
    try:
        with open(path, encoding="utf-8", newline="") as file:
            script = file.read()
    except (OSError, UnicodeDecodeError) as problem:
        raise BadValue(f"cloud_init cannot be read: {problem}") from None
    if not script.strip():
        raise BadValue(f"cloud_init {path!r} must not be empty")
    return script


# A machine that exists -------------------------------------------------------------------------

# The codenames that OrbStack's index uses for numbers; other versions read back as typed.
_CODENAMES = {
    "centos": {"9": "9-Stream", "10": "10-Stream"},
    "debian": {"11": "bullseye", "12": "bookworm", "13": "trixie", "14": "forky"},
    "devuan": {"4": "chimaera", "5": "daedalus", "6": "excalibur"},
    "ubuntu": {"22.04": "jammy", "24.04": "noble", "25.10": "questing", "26.04": "resolute"},
}


def check_image(image: str) -> None:
    """Check that OrbStack can be expected to have an image, without asking for it.

    For plans: in a deploy `orbctl` decides, since it may know more images. Numeric versions are
    not checked, since new ones appear all the time.

    Raises:
        BadValue: OrbStack cannot be expected to have it.
    """
    distro, _, version = image.partition(":")
    if distro not in DISTROS:
        raise BadValue(f"orbstack_image {image!r}: unknown distro{_nearest(distro, DISTROS)}")
    words = {*_CODENAMES.get(distro, {}).values(), *WORDS.get(distro, ())}
    if words and version.isalpha() and version not in words:
        raise BadValue(
            f"orbstack_image {image!r}: unknown version of {distro}{_nearest(version, words)}"
        )


def same_image(image: str, distro: str, version: str) -> bool | None:
    """Whether a machine was created from ``image``; None if unknown.

    >>> same_image("ubuntu:24.04", "ubuntu", "noble"), same_image("ubuntu", "ubuntu", "noble")
    (True, True)
    """
    wanted_distro, _, wanted = image.partition(":")
    if not distro:
        return None
    if wanted_distro != distro:
        return False
    codenames = _CODENAMES.get(distro, {})
    wanted, version = codenames.get(wanted, wanted), codenames.get(version, version)
    if not wanted or wanted == version:
        return True
    both = {wanted, version}
    known = both <= set(codenames.values())
    return False if known or all(re.fullmatch(r"[\d.]+", one) for one in both) else None


def same_mounts(wanted: Sequence[str], told: str) -> bool | None:
    """Whether a machine's ``mounts`` setting matches; None if unknown.

    OrbStack does not document how it reports several mounts, nor whether it keeps ``~``.
    """
    if re.search(r"[][{}\"']", told) or any("," in mount for mount in wanted):
        return None
    there = [mount for mount in re.split(r"[,\n]", told) if mount.strip()]
    if _same_ones(wanted, there):
        return True
    # On a Mac, /tmp and others are links, and letter case usually does not matter.
    plainer = [
        [re.sub("^/private(?=/)", "", one.strip().casefold()) for one in mounts]
        for mounts in (wanted, there)
    ]
    return None if _same_ones(*plainer) else False


def _same_ones(wanted: Sequence[str], there: Sequence[str]) -> bool:
    left = list(there)
    for mount in wanted:
        found = next((one for one in left if _same_mount(mount, one)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _same_mount(one: str, other: str) -> bool:
    ends = []
    for mount in (one, other):
        source, _, target = mount.strip().partition(":")
        ends.append([path.rstrip("/") for path in (source, target or source)])
    return all(a == b or _may_be_home(a, b) or _may_be_home(b, a) for a, b in zip(*ends))


def _may_be_home(short: str, path: str) -> bool:
    """Whether a path that begins with ``~`` can be another one; which home it is, is unknown."""
    return f"{short}/".startswith("~/") and path.startswith("/") and path.endswith(short[1:])
