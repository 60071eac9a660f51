"""The words of a report, which `words.jinja` holds apart from what is measured and drawn."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import jinja2


@functools.cache
def _template() -> jinja2.Template:
    source = (resources.files("saap.reporting") / "words.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    environment.filters |= {"n": lambda value, form: format(value, form)}
    return environment.from_string(source)


def words(block: str, **values: Any) -> str:
    """A block of the template as one line. Escaping is left to the page, as for all that is shown."""
    template = _template()
    return " ".join("".join(template.blocks[block](template.new_context(values))).split())


def caption(block: str, **values: Any) -> dict[str, Any]:
    """The title of a figure and its text: what it shows, for those who cannot see it."""
    title, _, text = words(block, **values).partition(" || ")
    return {"title": title, "text": text}
