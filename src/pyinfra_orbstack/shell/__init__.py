"""Shell that runs in a target: files of functions, and calls of them."""

from __future__ import annotations

import functools
import shlex
from importlib.resources import files


@functools.cache
def library(name: str) -> str:
    """The functions of a file of this package, without its comments."""
    lines = (files(__name__) / f"{name}.sh").read_text().splitlines()
    return "".join(f"{line.lstrip()}\n" for line in lines if not line.lstrip().startswith("#"))


def call(names: tuple[str, ...], *words: str, content: bool = False) -> bytes:
    """Shell text that defines the functions of some files and calls one with arguments.

    It is whole or does nothing: a call that is cut off is a syntax error. With ``content`` the call
    reads what comes behind it; else that is still to be read by the shell.

    Raises:
        UnicodeEncodeError: A word has no bytes in a file system.
    """
    line = " ".join(map(shlex.quote, words))
    end = "; }\n" if content else "; } </dev/null\n"
    return f"{''.join(map(library, names))}{{ {line}{end}".encode("utf-8", "surrogateescape")


_PLAIN = (
    b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;/_+=@#()[]{}<>|&~^*?!$"
)
_OCTAL = [chr(byte) if byte in _PLAIN else f"\\{byte:03o}" for byte in range(256)]


def octal(data: bytes) -> str:
    """``data`` as the format of a `printf`, in ASCII alone."""
    return "".join(map(_OCTAL.__getitem__, data))
