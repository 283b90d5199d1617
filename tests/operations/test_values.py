"""Values passed to `orbctl`, and comparisons with its answers."""

from __future__ import annotations

import doctest
import inspect
import logging
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from pyinfra_orbstack import answers, arguments, orbctl, specification, targets, timing


def test_examples_in_docstrings() -> None:
    for module in (answers, arguments, specification, targets):
        done = doctest.testmod(module)
        assert done.attempted > 0
        assert done.failed == 0


@pytest.mark.parametrize(
    "function", [timing.timed_operation, timing.timed, timing.configure_logging]
)
def test_examples_of_timing(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    example = str(inspect.getdoc(function)).partition(".. code:: python\n\n")[2]
    assert example
    with pytest.warns(DeprecationWarning, match=f"timing.{function.__name__}"):
        exec(textwrap.dedent(example), {**vars(timing), "build": lambda: None})  # noqa: S102


@pytest.mark.parametrize(
    ("limits", "settings"),
    [
        ({}, {}),
        ({"cpus": 1.5}, {"cpu": "1.5"}),
        ({"cpus": "4"}, {"cpu": "4"}),
        ({"cpus": 0}, {"cpu": "0"}),
        ({"memory": 4096}, {"memory_mib": "4096"}),
        ({"memory": "4g"}, {"memory_mib": "4096"}),
        ({"memory": "1.5G"}, {"memory_mib": "1536"}),
        ({"memory": "2T"}, {"memory_mib": str(2 << 20)}),
        ({"memory": "2048K"}, {"memory_mib": "2"}),
        ({"disk": "48G"}, {"disk_bytes": "51539607552"}),
        ({"disk": 0}, {"disk_bytes": "0"}),
    ],
)
def test_limits_as_settings(limits: dict[str, object], settings: dict[str, str]) -> None:
    assert orbctl.limits(**limits) == settings  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "limits",
    [
        *({"cpus": bad} for bad in (-1, "two", "", "1e3", "nan", True, " 1", "1;id")),
        *({"memory": bad} for bad in (-1, "4 G", "4GB", "", "G", "512K", True, "1e3", "-4G")),
        *({"disk": bad} for bad in (64, "64", "64X", "")),
    ],
)
def test_ambiguous_limits_are_rejected(limits: dict[str, object]) -> None:
    with pytest.raises(orbctl.BadValue):
        orbctl.limits(**limits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "distro", "version", "same"),
    [
        ("ubuntu", "ubuntu", "noble", True),
        ("ubuntu", "ubuntu", "", True),
        ("ubuntu:24.04", "ubuntu", "noble", True),
        ("ubuntu:noble", "ubuntu", "24.04", True),
        ("debian:12", "debian", "bookworm", True),
        ("centos:9", "centos", "9-Stream", True),
        ("fedora:43", "fedora", "43", True),
        ("ubuntu:26.10", "ubuntu", "26.10", True),
        ("ubuntu:jammy", "ubuntu", "noble", False),
        ("ubuntu:22.04", "ubuntu", "noble", False),
        ("fedora:42", "fedora", "43", False),
        ("debian", "ubuntu", "noble", False),
        ("debian:12", "ubuntu", "noble", False),
        ("ubuntu:26.10", "ubuntu", "noble", None),
        ("ubuntu:noble", "ubuntu", "zesty", None),
        ("alpine:edge", "alpine", "3.22", None),
        ("ubuntu:noble", "ubuntu", "", None),
        ("ubuntu:noble", "", "", None),
    ],
)
def test_same_image(image: str, distro: str, version: str, same: bool | None) -> None:
    assert specification.same_image(image, distro, version) is same


@pytest.mark.parametrize(
    ("wanted", "told", "same"),
    [
        ([], "", True),
        (["/a"], "/a", True),
        (["/a"], "/a:/a", True),
        (["/a/:/b"], "/a:/b/", True),
        (["/a", "/b:/c"], "/b:/c,/a", True),
        (["/a", "/b"], "/a\n/b\n", True),
        (["~/p:/work"], "/Users/alice/p:/work", True),
        (["/Users/alice/p:/work"], "~/p:/work", True),
        (["~"], "/Users/alice", True),
        (["~:/mac"], "/Users/alice:/mac", True),
        (["~/:/mac"], "/Users/alice/:/mac", True),
        (["~"], "relative", False),
        (["/tmp/x:/x"], "/private/tmp/x:/x", None),
        (["~/Src:/s"], "/Users/alice/src:/s", None),
        (["/tmp/x:/x"], "/private/tmp/y:/x", False),
        (["/a"], "", False),
        ([], "/a", False),
        (["/a"], "/a,/b", False),
        (["/a", "/a"], "/a", False),
        (["/a:/b"], "/a:/c", False),
        (["~/p"], "/Users/alice/other", False),
        (["/a"], '["/a"]', None),
        (["/a,b"], "/a,b", None),
    ],
)
def test_same_mounts(wanted: list[str], told: str, same: bool | None) -> None:
    assert specification.same_mounts(wanted, told) is same


def test_an_empty_machine_name_never_means_all_of_orbstack() -> None:
    with pytest.raises(orbctl.BadValue, match="requires a machine"):
        orbctl.machine_args("stop")
    for name in ("", "--all", "-a", "a b", "docker", "k8s"):
        with pytest.raises(orbctl.BadValue):
            orbctl.machine_args("delete --force", name)


def test_a_setting_can_be_cleared_but_is_never_a_flag() -> None:
    assert orbctl.config_args("machine.web.mounts", "") == [
        *("config", "set", "machine.web.mounts", "")
    ]
    for key, value in (("-k", "1"), ("", "1"), ("a b", "1"), ("k", "-1"), ("k", "a\nb")):
        with pytest.raises(orbctl.BadValue):
            orbctl.config_args(key, value)
