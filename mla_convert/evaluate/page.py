"""A page that is one file: the template, the style sheet, nothing from the network."""

from __future__ import annotations

from typing import Any

import jinja2


def render_page(template: str, **values: Any) -> str:
    """A template of this folder with `values`, everything from outside escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mla_convert.evaluate", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
