"""Parts of the standard library that take long to load, in a form that does not."""

from __future__ import annotations

try:  # hashlib loads OpenSSL, which takes longer than a whole call
    from _sha2 import sha256 as _sha256  # type: ignore[import-not-found]
except ImportError:
    try:
        from _sha256 import sha256 as _sha256  # type: ignore[import-not-found]
    except ImportError:
        from hashlib import sha256 as _sha256

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hashlib import sha256
else:
    sha256 = _sha256

__all__ = ["is_name", "sha256", "suppress"]

_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")


def is_name(text: str, others: str = "._-") -> bool:
    """Whether it is ASCII letters, digits and `others`, and begins with a letter or digit."""
    return text[:1] in _PLAIN and _PLAIN.union(others).issuperset(text)


class suppress:
    """Like `contextlib.suppress`."""

    def __init__(self, *kinds: type[BaseException]) -> None:
        self._kinds = kinds

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, self._kinds)
