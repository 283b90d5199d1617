"""Files made from the templates of this package."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Beside this file wherever the package is installed; the working directory is the user's.
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
)


def render(template: str, **values: object) -> str:
    """Return the text of a template with these values in it; each name in it must have one."""
    return TEMPLATES.get_template(template).render(**values)
