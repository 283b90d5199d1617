"""Rendering of this package's templates."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Relative to this file, because the working directory is the user's.
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
)


def render(template: str, **values: object) -> str:
    """Render a template with these values; a name without a value is an error."""
    return TEMPLATES.get_template(template).render(**values)
