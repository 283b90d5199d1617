"""Operations that pyinfra does not provide."""

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
    """Write a file, but put it in place only after a command has validated it.

    Some invalid files would lock everyone out. So the text is written next to its destination,
    under a name that sudo and sshd ignore, and moved into place after the check has passed.

    Args:
        text: The file's content.
        dest: The file's path.
        check: A shell command; the path of the new file is appended as its last argument.
        mode: The file's permissions.
    """
    if host.get_fact(Sha256File, path=dest) == hashlib.sha256(text.encode()).hexdigest():
        yield from files.file._inner(path=dest, user="root", group="root", mode=mode)
        return
    new = f"{dest}.new"
    yield from files.put._inner(src=StringIO(text), dest=new, user="root", group="root", mode=mode)
    path, target = QuoteString(new), QuoteString(dest)
    yield StringCommand(check, path, "&& mv -f", path, target, "|| { rm -f", path, "; false; }")
