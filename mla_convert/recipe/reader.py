"""Read YAML with the 1.2 core schema on top of PyYAML: `1e-4` is a float, `no` a string, duplicate keys an error."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from ..errors import UsageError

# Python and JSON have limits of their own, some way above these.
_MAX_DIGITS, _MAX_DEPTH = 1000, 100


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the tags of YAML 1.2 instead of 1.1; refuses duplicate keys and endless values."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        line = self.peek_event().start_mark.line + 1
        if self.depth == _MAX_DEPTH:
            raise UsageError(f"line {line}: lists and sections are nested more than {_MAX_DEPTH} deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        # A node gets its end when it is complete; the one that an alias inside it names is not.
        if node is not None and node.end_mark is None:
            raise UsageError(f"line {line}: a value contains itself; write out what the alias stands for")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                raise UsageError(f"line {line}: key {key_node.value!r} is not a string; put it in quotes")
            if key_node.value in seen:
                raise UsageError(
                    f"line {line}: key {key_node.value!r} was already given on line {seen[key_node.value]}; remove one"
                )
            seen[key_node.value] = line
        return super().construct_mapping(node, deep)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    if len(text) > _MAX_DIGITS:
        raise UsageError(f"line {node.start_mark.line + 1}: an integer of {len(text):,} digits is too long")
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


# Regular expressions of the YAML 1.2.2 specification, section 10.3.2.
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def read_yaml(text: str) -> Any:
    """The value of a YAML document. Raises UsageError with the line of the mistake."""
    try:
        return yaml.load(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"{line}not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"not valid YAML: {' '.join(str(error).split())}") from None
