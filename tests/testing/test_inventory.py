"""Several machines in one test, as the hosts of one inventory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyinfra_orbstack.testing import Inventory, MachineFactory

#: A host reads another host's fact and data.
SITE = """
from pyinfra import host, inventory
from pyinfra.facts.server import Hostname
from pyinfra.operations import files, server

(db,) = inventory.get_group("db")
if "web" in host.groups:
    known = f"{db.get_fact(Hostname)} {db.data.orbstack_ip4} {db.data.orbstack_domain}"
    line = f"{known} {host.data.word} {host.data.where}"
    files.line(name="Know the database", path="/tmp/site", line=line)
else:
    files.line(name="Be the database", path="/tmp/site", line="db")
server.shell(name="Reload", commands="true")
"""

NAMED = """
from pyinfra import host
from pyinfra.operations import server
server.shell(name="Compare", commands=f"test $(hostname) = {host.name}")
"""


@pytest.fixture(scope="module")
def site(orbstack_machines: MachineFactory) -> Iterator[Inventory]:
    with orbstack_machines.inventory(
        {"web": ["web-1", ("web-2", {"word": "own"})], "db": ["db-1"], "ssd": ["db-1", "web-1"]},
        every={"local": {"word": "local", "where": "here"}},
    ) as site:
        yield site


def function() -> None:
    exec(SITE, {})  # noqa: S102


def test_members(site: Inventory) -> None:
    assert len(site) == 3
    assert [machine.name[:-9] for machine in site] == ["web-1", "web-2", "db-1"]
    assert site.group("web") == [site["web-1"], site["web-2"]]
    assert site.group("ssd") == [site["web-1"], site["db-1"]]
    assert site.group("local") == list(site)
    assert site.group("other") == []
    assert len({machine.ip4 for machine in site}) == 3


@pytest.mark.parametrize("how", ["file", "function"])
def test_plain_names(orbstack_machines: MachineFactory, tmp_path: Path, how: str) -> None:
    (tmp_path / "deploy.py").write_text(NAMED)
    with orbstack_machines.inventory({"web": ["web-1"]}, plain=True) as site:
        (machine,) = site
        assert machine.host == f"@orbstack/plain/{machine.name}"
        deploy = tmp_path / "deploy.py" if how == "file" else lambda: exec(NAMED, {})  # noqa: S102
        (step,) = site.apply(deploy).steps
        assert (step.host, step.failed) == (machine.name, False)


@pytest.mark.parametrize("how", ["file", "function"])
def test_a_deploy_reaches_all_hosts_and_shares_their_data(
    site: Inventory, tmp_path: Path, how: str
) -> None:
    (tmp_path / "deploy.py").write_text(SITE)
    what = tmp_path / "deploy.py" if how == "file" else function
    for machine in site:
        machine.run("rm -f /tmp/site", user="root")

    result = site.apply(what)
    assert result.ok
    changed = {(step.host, step.name) for step in result.steps if step.changed}
    db = site["db-1"]
    assert {(db.host, "Be the database"), (db.host, "Reload")} < changed
    assert len(changed) == 6

    for name, word in (("web-1", "local"), ("web-2", "own")):
        line = f"{db.name} {db.ip4} {db.domain} {word} here\n"
        assert site[name].read("/tmp/site") == line
    assert db.read("/tmp/site") == "db\n"

    site.assert_idempotent(what, but=["Reload"])
    with pytest.raises(AssertionError, match=r"changed.*Reload"):
        site.assert_idempotent(what)


@pytest.mark.parametrize("how", ["file", "function"])
def test_a_failed_host_is_named(site: Inventory, tmp_path: Path, how: str) -> None:
    text = (
        "from pyinfra import host\nfrom pyinfra.operations import server\n"
        "server.shell(name='Fail here', commands='test ! -e /tmp/fail')\n"
    )
    (tmp_path / "deploy.py").write_text(text)

    def fail() -> None:
        exec(text, {})  # noqa: S102

    site["web-2"].run("touch /tmp/fail")
    result = site.apply(tmp_path / "deploy.py" if how == "file" else fail, check=False)
    assert not result.ok
    assert [step.host for step in result.steps if step.failed] == [site["web-2"].host]
    assert result.failed == ["Fail here"]


def test_a_deploy_can_target_one_host_of_an_inventory(site: Inventory, tmp_path: Path) -> None:
    (tmp_path / "deploy.py").write_text(
        "from pyinfra import host, inventory\nfrom pyinfra.operations import server\n"
        "name = ' '.join([*(one.name for one in inventory), host.data.word])\n"
        "server.shell(name=name, commands='true')\n"
    )
    result = site["web-2"].apply(tmp_path / "deploy.py")
    assert result.changed == [f"{site['web-2'].host} own"]


def test_an_invalid_inventory_is_rejected_before_creation(
    orbstack_machines: MachineFactory,
) -> None:
    before = orbstack_machines.engine.record.machines()
    with pytest.raises(ValueError, match="at least one host"):
        orbstack_machines.inventory({"web": []})
    with pytest.raises(TypeError, match="hosts of web must be a list of names, not 'web-1'"):
        orbstack_machines.inventory({"web": "web-1"})
    with pytest.raises(ValueError, match=r"'\.\./x' cannot be the name of a group"):
        orbstack_machines.inventory({"../x": ["web-1"]})
    with pytest.raises(TypeError, match="groups must be a list of names"):
        orbstack_machines.inventory({"web": ["web-1"]}, every="local")
    assert orbstack_machines.engine.record.machines() == before


def test_a_failed_creation_deletes_the_other_machines(orbstack_machines: MachineFactory) -> None:
    before = orbstack_machines.engine.record.machines()
    with pytest.raises(ValueError, match="name"):
        orbstack_machines.inventory({"web": ["web-1", "not a name"]})
    assert orbstack_machines.engine.record.machines() == before
