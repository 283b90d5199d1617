"""`push` and `pull`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.program import Program


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "inner" / "file").write_bytes(b"inner\xff\0")
    (tmp_path / "file").write_bytes(b"content\xff\0")
    return tmp_path


@pytest.fixture(autouse=True)
def clean_home(orb: Program, machine: str) -> Iterator[None]:
    yield
    orb("run", "-m", machine, "sh", "-c", "rm -rf ~/*")


def there(orb: Program, machine: str, path: str) -> bytes | None:
    answer = orb("run", "-m", machine, "sh", "-c", f"cat {path}")
    return answer.out if answer.code == 0 else None


@pytest.mark.fact("inferred")
def test_push_home(orb: Program, machine: str, tree: Path) -> None:
    """Without a destination, into the default user's home."""
    assert orb("push", "-m", machine, "file", cwd=tree).code == 0
    assert there(orb, machine, "~/file") == b"content\xff\0"
    user = orb("run", "-m", machine, "id", "-un").text
    assert orb("run", "-m", machine, "sh", "-c", "stat -c %U ~/file").text == user


@pytest.mark.fact("documented")
def test_push_renames(orb: Program, machine: str, tree: Path) -> None:
    """A file pushed to a file name is renamed; a relative destination is below home."""
    orb("run", "-m", machine, "sh", "-c", "mkdir ~/there")
    assert orb("push", "-m", machine, str(tree / "file"), "there/other").code == 0
    assert there(orb, machine, "~/there/other") == b"content\xff\0"


@pytest.mark.fact("conflict")
def test_push_into_a_directory(orb: Program, machine: str, tree: Path) -> None:
    """Several sources into a directory, directories with their content."""
    orb("run", "-m", machine, "sh", "-c", "mkdir ~/there")
    assert orb("push", "-m", machine, "file", "tree", "there", cwd=tree).code == 0
    assert there(orb, machine, "~/there/file") == b"content\xff\0"
    assert there(orb, machine, "~/there/tree/inner/file") == b"inner\xff\0"


@pytest.mark.fact("conflict")
def test_push_contents(orb: Program, machine: str, tree: Path) -> None:
    """``DIR/.`` copies the directory's content."""
    orb("run", "-m", machine, "sh", "-c", "mkdir ~/there")
    assert orb("push", "-m", machine, f"{tree}/tree/.", "there/").code == 0
    assert there(orb, machine, "~/there/inner/file") == b"inner\xff\0"


@pytest.mark.fact("inferred")
def test_push_creates_no_parent_directories(orb: Program, machine: str, tree: Path) -> None:
    """Missing parents are not created."""
    orb("push", "-m", machine, "file", "no/such/dir/file", cwd=tree)
    assert there(orb, machine, "~/no/such/dir/file") is None


@pytest.mark.fact("inferred")
def test_push_of_a_missing_file(orb: Program, machine: str, tree: Path) -> None:
    """The text is unknown; the exit code cannot be 0."""
    assert orb("push", "-m", machine, "no-such-file", cwd=tree).code != 0


@pytest.mark.fact("recorded")
def test_push_cannot_write_as_root(orb: Program, machine: str, tree: Path) -> None:
    """Targets that belong to root fail."""
    orb("push", "-m", machine, "file", "/etc/pushed", cwd=tree)
    assert there(orb, machine, "/etc/pushed") is None


@pytest.mark.fact("inferred")
def test_push_overwrites(orb: Program, machine: str, tree: Path) -> None:
    """An existing file is replaced."""
    orb("run", "-m", machine, "sh", "-c", "echo something that is longer >~/file")
    assert orb("push", "-m", machine, "file", cwd=tree).code == 0
    assert there(orb, machine, "~/file") == b"content\xff\0"


@pytest.mark.fact("conflict")
def test_pull(orb: Program, machine: str, tmp_path: Path) -> None:
    """Guest paths are relative to home; without a destination, into the caller's cwd."""
    script = "printf 'out\\377' >~/out; mkdir ~/dir; echo in >~/dir/in"
    orb("run", "-m", machine, "sh", "-c", script)
    assert orb("pull", "-m", machine, "out", cwd=tmp_path).code == 0
    assert (tmp_path / "out").read_bytes() == b"out\xff"
    assert orb("pull", "-m", machine, "out", "other", cwd=tmp_path).code == 0
    assert (tmp_path / "other").read_bytes() == b"out\xff"
    assert orb("pull", "-m", machine, "dir", str(tmp_path)).code == 0
    assert (tmp_path / "dir" / "in").read_text() == "in\n"


@pytest.mark.fact("inferred")
def test_pull_of_a_missing_file(orb: Program, machine: str, tmp_path: Path) -> None:
    """As with `push`."""
    assert orb("pull", "-m", machine, "no-such-file", cwd=tmp_path).code != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["push", "pull"])
@pytest.mark.fact("conflict")
def test_isolated(orb: Program, isolated: str, tree: Path, verb: str) -> None:
    """Neither works on an isolated machine, which shares no directory."""
    orb("run", "-m", isolated, "sh", "-c", "echo guest >~/guest")
    answer = orb(verb, "-m", isolated, "file" if verb == "push" else "guest", cwd=tree)
    assert answer.code != 0
    assert there(orb, isolated, "~/file") is None
    assert not (tree / "guest").exists()
