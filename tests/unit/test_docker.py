"""The calls of the docker command: arguments, and parsing of the output."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import Config, Inventory, State
from pyinfra.api.exceptions import InventoryError

from pyinfra_orbstack import cli, docker, inventory, inventory_files
from pyinfra_orbstack.connector import OrbStackConnector
from pyinfra_orbstack.docker import Container, ContainerNotFound, Docker, DockerError
from pyinfra_orbstack.places import SSH_KEY
from pyinfra_orbstack.targets import HostName, meaning

WEB = "4" * 64
OLD = "4" * 63 + "5"

# The engine's answer, reduced to the values that are read.
RECORDS: dict[str, dict[str, Any]] = {
    WEB: {
        "Id": WEB,
        "Name": "/shop-web-1",
        "State": {"Status": "running", "Running": True},
        "Config": {
            "Image": "nginx:1.27-alpine",
            "Labels": {
                "com.docker.compose.project": "shop",
                "com.docker.compose.service": "web",
            },
        },
        "NetworkSettings": {
            "Ports": {
                "80/tcp": [
                    {"HostIp": "0.0.0.0", "HostPort": "8080"},  # noqa: S104
                    {"HostIp": "::", "HostPort": "8080"},
                ],
                "443/tcp": None,
            }
        },
    },
    OLD: {
        "Id": OLD,
        "Name": "/old",
        "State": {"Status": "exited", "Running": False},
        "Config": {"Image": "sha256:" + "a" * 64, "Labels": None},
        "NetworkSettings": {"Ports": {}},
    },
}

Fake = Callable[..., Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Puts a docker command on PATH that runs a shell script."""

    def make(script: str, *, named: bool = True) -> Path:
        path = tmp_path / "docker"
        path.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/calls"\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        if named:
            monkeypatch.setenv(docker.COMMAND_VARIABLE, str(path))
        else:
            monkeypatch.delenv(docker.COMMAND_VARIABLE, raising=False)
        return tmp_path / "calls"

    inventory.list_containers.cache.clear()
    yield make
    inventory.list_containers.cache.clear()


@pytest.fixture
def two(fake: Fake) -> Path:
    """An engine with the two containers."""
    answer = json.dumps(list(RECORDS.values()))
    return fake(
        f"case $1 in ps) printf '%s\\n' {WEB} {OLD};; "
        f"container) cat <<'END'\n{answer}\nEND\n;; esac"
    )


def hosts(name: str) -> dict[str, tuple[dict[str, Any], list[str]]]:
    return {host: (data, groups) for host, data, groups in OrbStackConnector.make_names_data(name)}


def test_the_running_containers_are_hosts(two: Path) -> None:
    found = hosts("docker")
    assert list(found) == ["@orbstack/docker/shop-web-1"]
    data, groups = found["@orbstack/docker/shop-web-1"]
    assert groups == [
        "@orbstack",
        "orbstack_containers",
        "orbstack_image_nginx",
        "orbstack_project_shop",
    ]
    assert data == {
        "orbstack_start": False,
        "container_id": WEB,
        "container_name": "shop-web-1",
        "container_image": "nginx:1.27-alpine",
        "container_state": "running",
        "container_labels": RECORDS[WEB]["Config"]["Labels"],
        "container_project": "shop",
        "container_service": "web",
        "container_domain": "web.shop.orb.local",
        "container_ports": {"80/tcp": [8080]},
    }


@pytest.mark.parametrize("name", ["docker/old", f"docker/{OLD}", f"docker/{OLD[:63]}5"])
def test_a_named_container_may_be_stopped(two: Path, name: str) -> None:
    data, groups = hosts(name)["@orbstack/docker/old"]
    assert data["container_state"] == "exited"
    assert "orbstack_start" not in data
    # With the last, `--limit` accepts the name as written.
    written = [f"@orbstack/{name}"] if OLD[:20] in name else []
    assert groups == ["@orbstack", "orbstack_containers", *written]


@pytest.mark.parametrize("plain", ["", "plain/"])
def test_a_container_by_id_has_the_name_that_pyinfra_calls_it_by(two: Path, plain: str) -> None:
    written = f"@orbstack/{plain}docker/{OLD}"
    ((host, (_, groups)),) = hosts(written[len("@orbstack/") :]).items()
    assert cli.local_states([written]) == {host: "exited"}
    # What `pyinfra-orbstack` calls it, before it has read the containers.
    assert inventory_files._called(written) in groups


def test_a_container_here_is_not_taken_for_one_of_a_mac(two: Path) -> None:
    listed = Inventory(([(f"@orbstack/docker/{OLD}", {SSH_KEY: "mac"})], {}))
    State(listed, Config())
    (host,) = listed
    assert meaning(host) == HostName(True, OLD)
    assert host.data.container_name == OLD
    assert host.data.get("container_id") is None


@pytest.mark.parametrize("name", ["web", "plain/web", "docker/web", "plain/docker/web"])
def test_one_name_on_two_macs_is_refused(two: Path, name: str) -> None:
    """pyinfra would forget one of them."""
    hosts = [(f"@orbstack/{name}", {SSH_KEY: mac}) for mac in ("mac-a", "mac-b", "mac-a")]
    for names, groups in ((hosts, {}), ([hosts[0][0]], {"a": (hosts[:1], {}), "b": (hosts, {})})):
        with pytest.raises(InventoryError, match=r"^two hosts are called .*on mac-a and mac-b: "):
            Inventory((names, {}), **groups)
    none = (hosts[0][0], {SSH_KEY: None}, "a note")
    assert len(Inventory((hosts[:1] + hosts[2:], {}), a=([hosts[0][0]], {}), b=([none], {}))) == 1


def test_data_of_ones_own_is_kept_on_a_mac(two: Path) -> None:
    own = {"container_name": "mine", "container_port": 80, "vm_role": "db", "vm_name": "other"}
    hosts = [(f"@orbstack/{name}", {SSH_KEY: "mac", **own}) for name in ("web", "docker/old")]
    listed = Inventory((hosts, {}))
    State(listed, Config())
    for host in listed:
        assert {key: host.data.get(key) for key in own} == own
        assert host.data.get("container_id") is None


def test_an_ambiguous_name_is_resolved_on_connect(two: Path) -> None:
    for name in ("444", "missing"):
        data, groups = hosts(f"docker/{name}")[f"@orbstack/docker/{name}"]
        assert data == {"container_name": name}
        assert groups == ["@orbstack", "orbstack_containers"]


def test_patterns_select_running_containers(two: Path) -> None:
    assert list(hosts("docker/shop-*")) == ["@orbstack/docker/shop-web-1"]
    assert list(hosts("docker/*")) == ["@orbstack/docker/shop-web-1"]


def test_a_pattern_without_a_match_fails_only_as_its_own_host(two: Path) -> None:
    """pyinfra expands it even if ``--limit`` excludes it."""
    assert hosts("docker/o*") == {"@orbstack/docker/o*": ({}, ["@orbstack"])}
    reason = "no running container matches 'o*' (existing: shop-web-1)"
    assert inventory.no_match(HostName(True, "o*")) == reason


def test_containers_are_listed_once(two: Path) -> None:
    for _ in range(3):
        hosts("docker")
    assert len(two.read_text().splitlines()) == 2


def test_no_engine(fake: Fake) -> None:
    fake("echo 'Cannot connect to the Docker daemon at unix:///x. Is it running?' >&2; exit 1")
    with pytest.raises(InventoryError, match="cannot list containers: Cannot connect"):
        hosts("docker")
    assert list(hosts("docker/*")) == ["@orbstack/docker/*"]
    reason = inventory.no_match(HostName(True, "*"))
    assert reason.startswith("cannot list containers: Cannot connect")
    assert list(hosts("docker/web")) == ["@orbstack/docker/web"]


def test_no_container(fake: Fake) -> None:
    fake("exit 0")
    with pytest.raises(InventoryError, match="no container is running"):
        hosts("docker")


@pytest.mark.parametrize(
    "answer",
    ["", "null", "garbage", "{}", "[{}]", '[{"Id": "4"}]', pytest.param("[" * 50_000, id="[")],
)
def test_malformed_answers(fake: Fake, answer: str) -> None:
    fake(f"[ $1 = ps ] && echo {WEB} || echo '{answer}'")
    with pytest.raises(DockerError, match="did not print a list of containers"):
        Docker().containers()


def test_a_container_removed_during_the_listing(fake: Fake) -> None:
    left = json.dumps([RECORDS[WEB]])
    fake(
        f"case $1 in ps) printf '%s\\n' {WEB} {OLD};; container) echo '{left}'; "
        f"echo 'Error: No such container: {OLD}' >&2; exit 1;; esac"
    )
    assert [one.name for one in Docker().containers()] == ["shop-web-1"]
    with pytest.raises(ContainerNotFound, match="No such container"):
        Docker().inspect("old")


@pytest.mark.parametrize("advice", ["See 'docker run --help'.", "Run 'docker run --help' for more"])
def test_hints_below_an_error_are_left_out(advice: str) -> None:
    said = f"docker: Error response from daemon: No such image: web:1\n\n{advice}\n"
    assert str(docker.error_of(said, 125)) == "No such image: web:1"


def test_orbstacks_context_is_used_where_there_is_one(fake: Fake) -> None:
    calls = fake("exit 0", named=False)
    assert Docker().containers() == []
    assert calls.read_text().splitlines() == [
        "context inspect orbstack",
        "--context orbstack ps --all --quiet --no-trunc",
    ]


def test_without_the_orbstack_context_the_command_is_unchanged(fake: Fake) -> None:
    fake("[ $1 != context ]", named=False)
    assert len(Docker().argv([])) == 1


def test_a_named_command_is_used_unchanged(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake("exit 0")
    Docker().containers()
    assert calls.read_text().splitlines() == ["ps --all --quiet --no-trunc"]
    monkeypatch.setenv(docker.COMMAND_VARIABLE, "no-such-command")
    with pytest.raises(DockerError, match="no such executable"):
        Docker()


def test_a_command_that_hangs(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("sleep 60")
    monkeypatch.setattr(docker, "READ_TIMEOUT", 0.2)
    with pytest.raises(DockerError, match=r"did not answer in 0\.2 s"):
        Docker().containers()


@pytest.mark.parametrize(
    "name", ["-v", "--help", "a b", "../x", "$(id)", "a\nb", "", "a/b", "web\0", ";id"]
)
def test_an_invalid_name_reaches_no_command(two: Path, name: str) -> None:
    with pytest.raises(DockerError, match="is not a valid name or id of a container"):
        Docker().inspect(name)
    assert not two.exists()


def test_command_lines() -> None:
    assert docker.exec_args("web", ["sh"]) == ["exec", "--interactive", "web", "sh"]
    assert docker.exec_args("web", ["sh"], user="root", tty=True) == (
        ["exec", "--interactive", "--tty", "--user", "0", "web", "sh"]
    )
    with pytest.raises(DockerError, match="must not begin with '-'"):
        docker.exec_args("web", ["sh"], user="-x")


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("nginx", "nginx"),
        ("nginx:1.27", "nginx"),
        ("ghcr.io:443/acme/web:1@sha256:" + "0" * 64, "web"),
        ("localhost/a.b-c", "a.b-c"),
        ("sha256:" + "0" * 64, None),
        ("0123456789ab", None),
        ("", None),
    ],
)
def test_image_names(image: str, name: str | None) -> None:
    assert Container("1", "web", image).image_name == name


def compose(**labels: str) -> dict[str, str]:
    """The labels that compose sets on a service's container."""
    labels = {"project": "my_shop", "service": "web_app", **labels}
    return {f"com.docker.compose.{key.replace('_', '-')}": value for key, value in labels.items()}


@pytest.mark.parametrize(
    ("labels", "domain"),
    [
        ({}, "web.orb.local"),
        ({"com.docker.compose.project": "shop"}, "web.orb.local"),
        ({"com.docker.compose.project": "a", "com.docker.compose.service": "b"}, "b.a.orb.local"),
        ({"dev.orbstack.domains": "own.local, other.local"}, "own.local"),
        ({"dev.orbstack.domains": "*.own.local, own.local"}, "own.local"),
        ({"dev.orbstack.domains": "*.own.local"}, "web.orb.local"),
        (compose(), "web-app.my-shop.orb.local"),
        (compose(container_number="1", oneoff="False"), "web-app.my-shop.orb.local"),
        (compose(container_number="2", oneoff="False"), "web.orb.local"),
        (compose(container_number="1", oneoff="True"), "web.orb.local"),
        ({**compose(oneoff="True"), "dev.orbstack.domains": "a_b.local"}, "a_b.local"),
    ],
)
def test_domains(labels: dict[str, str], domain: str) -> None:
    assert Container("1", "web", labels=labels).domain == domain


def test_a_domain_has_no_underscores() -> None:
    run = Container("1", "my_shop-web_app-run-0f", labels=compose(oneoff="True"))
    assert run.domain == "my-shop-web-app-run-0f.orb.local"
