"""The specification of a machine: an invalid value is reported with its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyinfra_orbstack import orbctl, specification
from pyinfra_orbstack.connector import connector_data_meta
from pyinfra_orbstack.orbctl import BadValue


def data(**values: Any) -> dict[str, Any]:
    """All keys of the connector, with these values and the defaults of the others."""
    defaults = {key: meta.default for key, meta in connector_data_meta.items()}
    assert not set(values) - set(defaults)
    return {**defaults, "orbstack_image": "ubuntu:noble", **values}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("orbstack_image", "", "orbstack_image must not be empty"),
        ("orbstack_image", 24.04, "orbstack_image must be text, not 24.04"),
        ("orbstack_image", "-x", "orbstack_image '-x' must not begin with '-'"),
        ("orbstack_image", "ubuntu:", "must be DISTRO or DISTRO:VERSION, not 'ubuntu:'"),
        ("orbstack_image", ":noble", "must be DISTRO or DISTRO:VERSION, not ':noble'"),
        ("orbstack_arch", "x86_64", "orbstack_arch must be arm64 or amd64, not 'x86_64'"),
        (
            "orbstack_create_user",
            "a\nb",
            "orbstack_create_user 'a\\\\nb' must not contain a control character",
        ),
        ("orbstack_create_user", "", "orbstack_create_user must not be empty"),
        ("orbstack_cloud_init", "/no/such", "orbstack_cloud_init must be a file on this host, not"),
        (
            "orbstack_cloud_init",
            "/tmp",
            "orbstack_cloud_init must be a file on this host, not '/tmp'",
        ),
        ("orbstack_cpus", "many", "orbstack_cpus must be a number such as 2, not 'many'"),
        ("orbstack_cpus", -1, "orbstack_cpus must be a number such as 2, not -1"),
        ("orbstack_memory", "4Q", "orbstack_memory must be a size such as"),
        ("orbstack_memory", True, "orbstack_memory must be a size such as"),
        ("orbstack_disk", "64", "orbstack_disk requires a unit"),
        ("orbstack_mounts", ["/srv"], "orbstack_mounts requires orbstack_isolated"),
        ("orbstack_isolate_network", True, "orbstack_isolate_network requires orbstack_isolated"),
    ],
)
def test_a_bad_value_is_named_with_its_key(key: str, value: Any, reason: str) -> None:
    with pytest.raises(BadValue, match=reason.replace("(", r"\(")) as caught:
        specification.create_args("web", data(**{key: value}))
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mount_is_one_value() -> None:
    with pytest.raises(BadValue, match="orbstack_mounts '-v' must not begin with '-'"):
        specification.create_args("web", data(orbstack_isolated=True, orbstack_mounts=["-v"]))


def test_valid_values_become_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "init.yml").write_text("#cloud-config\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    values = data(
        orbstack_arch="amd64",
        orbstack_create_user="admin",
        orbstack_cloud_init="~/init.yml",
        orbstack_isolated=True,
        orbstack_isolate_network=True,
        orbstack_mounts=["/srv:/data"],
        orbstack_cpus=0.5,
        orbstack_memory="4G",
        orbstack_disk="64G",
    )
    assert specification.create_args("web", values) == orbctl.create_args(
        "web",
        "ubuntu:noble",
        arch="amd64",
        user="admin",
        cloud_init=str(tmp_path / "init.yml"),
        isolated=True,
        isolate_network=True,
        mounts=["/srv:/data"],
        cpus=0.5,  # type: ignore[arg-type]
        memory="4G",
        disk="64G",
    )


def test_every_machine_key_is_checked() -> None:
    """A key that is added to the connector must be added here too."""
    elsewhere = {"user", "workdir", "create", "start", "boot_timeout", "transport", "ssh"}

    class Looked(dict[str, Any]):
        seen: set[str] = set()

        def __getitem__(self, key: str) -> Any:
            self.seen.add(key)
            return super().__getitem__(key)

    specification.create_args("web", Looked(data()))
    assert Looked.seen == {key for key in connector_data_meta if key[9:] not in elsewhere}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("orbstack_imag", "orbstack_image"),
        ("orbstack_cpu", "orbstack_cpus"),
        ("orbstack_isolate_networks", "orbstack_isolate_network"),
        ("orbstack_boottimeout", "orbstack_boot_timeout"),
    ],
)
def test_an_unknown_key_error_suggests_the_nearest_key(key: str, nearest: str) -> None:
    with pytest.raises(
        BadValue, match=f"^{key} is not a key of this connector; did you mean {nearest}"
    ):
        specification.check_keys(["port", key], connector_data_meta)


def test_keys_may_be_any_type() -> None:
    specification.check_keys([1, None, ("orbstack_imag",)])  # type: ignore[list-item]


def test_other_keys_are_accepted() -> None:
    given = [*connector_data_meta, "orbstack_vm", "vm_name", "orbstack", "_sudo", "ssh_user", "orb"]
    specification.check_keys(given, connector_data_meta)


@pytest.mark.parametrize(
    "image", ["ubuntu", "ubuntu:noble", "ubuntu:27.04", "debian:sid", "arch:x"]
)
def test_an_image_that_may_exist(image: str) -> None:
    specification.check_image(image)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("ubunto:noble", "unknown distro; did you mean ubuntu"),
        ("nosuch:1", "unknown distro (known: alma, "),
        ("ubuntu:nobel", "unknown version of ubuntu; did you mean noble"),
        ("debian:nosuch", "unknown version of debian (known: bookworm, "),
    ],
)
def test_an_image_that_cannot_exist(image: str, reason: str) -> None:
    with pytest.raises(BadValue) as caught:
        specification.check_image(image)
    assert f"orbstack_image {image!r}: {reason}" in str(caught.value)


@given(st.text(max_size=20), st.sampled_from(sorted(connector_data_meta)))
def test_any_text_is_accepted_or_a_one_line_error(text: str, key: str) -> None:
    """pyinfra rejects values of the wrong type; we check strings."""
    if isinstance(connector_data_meta[key].default, (bool, list)):
        return
    said = args = None
    try:
        args = specification.create_args("web", data(**{key: text}))
    except BadValue as bad:
        said = str(bad)
    assert all(args) if args else said and key in said and len(said.splitlines()) == 1
