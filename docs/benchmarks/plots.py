"""Figures of the documentation: SVG files with the look of the report, readable on light and dark pages."""

from __future__ import annotations

import re
from pathlib import Path

MARGIN = 12
SCALE = 1.3

# An image does not see the page's style sheet, so each brings its own and a ground of its own.
STYLE = """
  svg { --paper: #ffffff; --ink: #1a1e23; --muted: #5f6973; --rule: #e3e7eb; --teacher: #8b95a0; --student: #14708a;
    --run-1: #14708a; --run-2: #c2570c; --run-3: #7a5aa8; --run-4: #2f7d3b; --run-5: #b02a5b; --run-6: #7d6608; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #1e2129; --ink: #e4e7ea; --muted: #a3adb7; --rule: #343b44; --teacher: #7f8a96; --student: #57b7cd;
      --run-1: #57b7cd; --run-2: #f0965a; --run-3: #b49ae0; --run-4: #7cc388; --run-5: #ee86ab; --run-6: #d3bb57; }
  }
  text { font-family: Inter, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif; }
  .ground { fill: var(--paper); }
"""


def save(svg: str, path: Path) -> None:
    """Write what `Chart` drew as a file that stands alone; equal charts give equal bytes."""
    match = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert match
    width, height = (float(size) + 2 * MARGIN for size in match.groups())
    size = f'width="{SCALE * width:.0f}" height="{SCALE * height:.0f}"'
    box = f'viewBox="{-MARGIN} {-MARGIN} {width:g} {height:g}" {size}'
    head, rest = svg.replace(match[0], box, 1).split(">", 1)
    ground = f'<rect class="ground" x="{-MARGIN}" y="{-MARGIN}" width="{width:g}" height="{height:g}" rx="6"/>'
    text = f"{head}>\n <style>{STYLE} </style>\n {ground}{rest}"
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
