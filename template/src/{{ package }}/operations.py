"""Operations that pyinfra does not have."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from io import StringIO
from typing import Any

from pyinfra import host
from pyinfra.api import QuoteString, StringCommand, operation
from pyinfra.facts.files import Sha256File
from pyinfra.operations import files


@operation()
def checked_file(
    text: str, dest: str, check: str, mode: str = "0644"
) -> Generator[Any, None, None]:
    """Put a file in place only after a command has accepted it.

    A broken file in some places locks everybody out. So the text goes beside its destination,
    under a name that sudo and sshd overlook, and is moved there when the check has passed.

    Args:
        text: The file's content.
        dest: Where it belongs.
        check: Shell command that gets the path of the new file as its last argument.
        mode: Permissions.
    """
    if host.get_fact(Sha256File, path=dest) == hashlib.sha256(text.encode()).hexdigest():
        yield from files.file._inner(path=dest, user="root", group="root", mode=mode)
        return
    new = f"{dest}.new"
    yield from files.put._inner(src=StringIO(text), dest=new, user="root", group="root", mode=mode)
    path, target = QuoteString(new), QuoteString(dest)
    yield StringCommand(check, path, "&& mv -f", path, target, "|| { rm -f", path, "; false; }")
