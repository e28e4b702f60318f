"""Renders a page as one file with its style sheet; nothing is loaded from the network."""

from __future__ import annotations

from typing import Any

import jinja2


def render_page(template: str, **values: Any) -> str:
    """Render a template of this folder with `values`, which are HTML-escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mla_convert.evaluate", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
