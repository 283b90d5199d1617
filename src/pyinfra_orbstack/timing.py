"""How long something takes, in the log."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def timed_operation(operation_name: str) -> Iterator[None]:
    """Log how long the body takes, whether it succeeds or not.

    >>> with timed_operation("build"):
    ...     pass
    """
    began = time.monotonic()
    logger.info("Starting %s", operation_name)
    try:
        yield
    except BaseException as error:
        seconds = time.monotonic() - began
        logger.error("Failed %s after %.2fs: %s", operation_name, seconds, error)
        raise
    logger.info("Completed %s in %.2fs", operation_name, time.monotonic() - began)


@overload
def timed(operation_name: F) -> F: ...
@overload
def timed(operation_name: str | None = None) -> Callable[[F], F]: ...
def timed(operation_name: Any = None) -> Any:
    """Decorate a function so that `timed_operation` is around each of its calls.

    >>> @timed("build")
    ... def build() -> None: ...
    """
    if callable(operation_name):
        return timed()(operation_name)

    def decorate(function: F) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with timed_operation(operation_name or function.__name__):
                return function(*args, **kwargs)

        return run

    return decorate


def configure_logging(level: int = logging.INFO) -> None:
    """Show the log of programs that do not set up logging themselves."""
    logging.basicConfig(format="%(asctime)s - %(name)s - %(levelname)s - %(message)s", level=level)
