"""Logging of how long something takes: the functions from before 1.0, for existing programs."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger(__name__)


#: The replacement for each function.
INSTEAD = {
    "timed_operation": "time.monotonic and logging",
    "timed": "time.monotonic and logging",
    "configure_logging": "logging.basicConfig",
}


def _warn(name: str) -> None:
    text = f"timing.{name} is deprecated: use {INSTEAD[name]}"
    warnings.warn(text, DeprecationWarning, stacklevel=3)


@contextlib.contextmanager
def _timed(operation_name: str) -> Iterator[None]:
    began = time.monotonic()
    logger.info("Starting %s", operation_name)
    try:
        yield
    except BaseException as error:
        seconds = time.monotonic() - began
        logger.error("Failed %s after %.2fs: %s", operation_name, seconds, error)
        raise
    logger.info("Completed %s in %.2fs", operation_name, time.monotonic() - began)


def timed_operation(operation_name: str) -> contextlib.AbstractContextManager[None]:
    """Log how long the body takes, whether it succeeds or not.

    + operation_name: what the log calls it

    **Returns:** a context manager

    **Example:**

    .. code:: python

        with timed_operation("build"):
            build()
    """
    _warn("timed_operation")
    return _timed(operation_name)


@overload
def timed(operation_name: F) -> F: ...
@overload
def timed(operation_name: str | None = None) -> Callable[[F], F]: ...
def timed(operation_name: Any = None) -> Any:
    """Decorate a function so that ``timed_operation`` wraps each of its calls.

    + operation_name: what the log calls it; by default the name of the function

    **Returns:** the decorated function, or a decorator

    **Example:**

    .. code:: python

        @timed("build")
        def build(): ...
    """
    _warn("timed")
    title = None if callable(operation_name) else operation_name

    def decorate(function: F) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with _timed(title or function.__name__):
                return function(*args, **kwargs)

        return run

    return decorate(operation_name) if callable(operation_name) else decorate


def configure_logging(level: int = logging.INFO) -> None:
    """Show log messages in programs that do not set up logging themselves.

    + level: the least important level to show

    **Example:**

    .. code:: python

        configure_logging(logging.DEBUG)
    """
    _warn("configure_logging")
    logging.basicConfig(format="%(asctime)s - %(name)s - %(levelname)s - %(message)s", level=level)
