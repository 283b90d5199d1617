"""What a machine is made from: the data of a host that say so, checked in one place.

A plan and a deploy come through here, so that the one promises nothing that the other cannot do.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pyinfra_orbstack import orbctl
from pyinfra_orbstack.orbctl import BadValue

PREFIX = "orbstack_"
#: Keys with our prefix that a host has without anybody's doing.
GIVEN = frozenset({"orbstack_vm"})

#: What `orbctl create` can make machines of, as of OrbStack 2.2.
DISTROS = frozenset(
    [
        *("alma", "alpine", "arch", "centos", "debian", "devuan", "fedora", "gentoo", "kali"),
        *("nixos", "openeuler", "opensuse", "oracle", "rocky", "ubuntu", "void"),
    ]
)
#: Versions that are words without a number, beside those that have one.
WORDS = {"debian": {"sid", "testing", "unstable"}, "devuan": {"ceres", "testing", "unstable"}}


def check_keys(given: Iterable[str], known: Collection[str]) -> None:
    """See that each key with our prefix is one that means something.

    Args:
        given: The keys of a host's data, from wherever they come.
        known: The keys of the connector.

    Raises:
        BadValue: One is unknown; the nearest one that is known is named.
    """
    for key in given:
        if key.startswith(PREFIX) and key not in known and key not in GIVEN:
            raise BadValue(f"{key} is not a key of this connector{_nearest(key, known)}")


def create_args(name: str, data: Mapping[str, Any]) -> list[str]:
    """The arguments of `orbctl` that create a machine as a host's data say.

    Args:
        name: Its name.
        data: The data of the connector, with all its keys.

    Raises:
        BadValue: A value that cannot work; its key is named.
    """
    image = _text("orbstack_image", data["orbstack_image"])
    distro, colon, version = image.partition(":")
    if not distro or bool(colon) != bool(version):
        raise BadValue(f"orbstack_image is DISTRO or DISTRO:VERSION, not {image!r}")
    for what in ("cpus", "memory", "disk"):
        try:
            orbctl.limits(**{what: data[PREFIX + what]})
        except BadValue as bad:
            raise BadValue(f"{PREFIX}{bad}") from None
    arch = data["orbstack_arch"]
    if arch is not None:
        try:
            orbctl.check_arch(arch)
        except BadValue as bad:
            raise BadValue(f"{PREFIX}{bad}") from None
    cloud_init = data["orbstack_cloud_init"]
    if cloud_init is not None:
        cloud_init = os.path.expanduser(_text("orbstack_cloud_init", cloud_init))
        if not os.path.isfile(cloud_init):
            raise BadValue(f"orbstack_cloud_init is a file on this computer, not {cloud_init!r}")
    user = data["orbstack_create_user"]
    if user is not None:
        _text("orbstack_create_user", user)
    isolated = data["orbstack_isolated"]
    for key in ("orbstack_isolate_network", "orbstack_mounts"):
        if data[key] and not isolated:
            raise BadValue(f"{key} needs orbstack_isolated")
    for mount in data["orbstack_mounts"]:
        _text("orbstack_mounts", mount)
    return orbctl.create_args(
        name,
        image,
        arch=arch,
        user=user,
        cloud_init=cloud_init,
        isolated=isolated,
        isolate_network=data["orbstack_isolate_network"],
        mounts=data["orbstack_mounts"],
        cpus=data["orbstack_cpus"],
        memory=data["orbstack_memory"],
        disk=data["orbstack_disk"],
    )


def check_image(image: str) -> None:
    """See that OrbStack can be expected to have an image, without asking for it.

    For plans: a deploy leaves the answer to `orbctl`, which may know more than is known here.
    Versions that are numbers are not looked at, since there are new ones all the time.

    Raises:
        BadValue: It cannot.
    """
    distro, _, version = image.partition(":")
    if distro not in DISTROS:
        raise BadValue(f"orbstack_image {image!r}: unknown distro{_nearest(distro, DISTROS)}")
    words = {*orbctl._CODENAMES.get(distro, {}).values(), *WORDS.get(distro, ())}
    if words and version.isalpha() and version not in words:
        raise BadValue(
            f"orbstack_image {image!r}: unknown version of {distro}{_nearest(version, words)}"
        )


def _text(key: str, value: Any) -> str:
    return orbctl.check_value(key, value)


def _nearest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else f" (known: {', '.join(sorted(known))})"
