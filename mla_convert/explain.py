"""Turn pydantic's validation errors into lines that name the key and the remedy."""

from __future__ import annotations

import difflib
import json
import re
import textwrap
import typing
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from .errors import nearest, quoted

EXPECTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "none_required": "null",
}


def describe(value: Any) -> str:
    """Describe a value with its type, in the words of a recipe: `'abc' (a string)`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    if isinstance(value, dict):
        return "a section of keys"
    if isinstance(value, list):
        return textwrap.shorten(json.dumps(value, ensure_ascii=False), 80, placeholder=" ...") + " (a list)"
    kind = {int: "an integer", float: "a number", str: "a string"}.get(type(value), type(value).__name__)
    return f"{quoted(value)} ({kind})"


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation such as `list[X] | None` can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in models_in(argument)]


class _Problem(NamedTuple):
    """One of pydantic's errors; `path` is its key in the recipe, `model` the section class that the key belongs to."""

    path: tuple[str, ...]
    model: type[BaseModel] | None
    kind: str
    message: str
    value: Any
    context: dict[str, Any]


def _locate(root: type[BaseModel], detail: Any) -> _Problem:
    """Convert an error, leaving out the branches of unions that pydantic adds to its location."""
    path: list[str] = []
    current: type[BaseModel] | None = root
    owner = current
    location, kind = detail["loc"], detail["type"]
    for depth, entry in enumerate(location):
        field = current.model_fields.get(str(entry)) if current else None
        unknown = kind == "extra_forbidden" and depth == len(location) - 1
        if field is None and not unknown and not isinstance(entry, int):
            continue
        path.append(str(entry))
        owner = current
        if field is not None:
            found = models_in(field.annotation)
            current = found[0] if found else None
    return _Problem(tuple(path), owner, kind, detail["msg"], detail["input"], detail.get("ctx", {}))


def explain(error: ValidationError, root: type[BaseModel], prefix: str = "") -> list[str]:
    """Explain a failed validation of `root`, which is at dotted path `prefix` of the recipe: one line per mistake."""
    # An unknown key is usually a misspelling and the cause of a missing one.
    problems = sorted(
        (_locate(root, detail) for detail in error.errors(include_url=False)),
        key=lambda problem: problem.kind != "extra_forbidden",
    )
    lines = []
    while problems:
        # Every branch of a union reports errors; the deepest one is from the branch that was meant.
        related = [p for p in problems if _overlap(p.path, problems[0].path)]
        deepest = max(related, key=lambda problem: len(problem.path))
        lines.append(_explain(deepest, [p for p in related if p.path == deepest.path], prefix))
        problems = [p for p in problems if p not in related]
    return lines


def _overlap(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether one path is a prefix of the other."""
    shorter = min(len(a), len(b))
    return a[:shorter] == b[:shorter]


def _explain(problem: _Problem, same_place: list[_Problem], prefix: str) -> str:
    path = ".".join([prefix, *problem.path] if prefix else problem.path)
    value = problem.value
    if problem.kind == "extra_forbidden":
        valid = list(problem.model.model_fields) if problem.model else []
        return f"unknown key {path}; {nearest(problem.path[-1], valid)}"
    if problem.kind == "missing":
        return f"missing key {path}"
    if problem.kind == "literal_error":
        matches = difflib.get_close_matches(str(value), re.findall(r"'([^']+)'", problem.context["expected"]), n=1)
        hint = f"; did you mean {matches[0]}?" if matches else ""
        return f"{path}: expected {problem.context['expected']}, got {describe(value)}{hint}"
    if problem.kind in EXPECTED:
        expected = dict.fromkeys(EXPECTED[p.kind] for p in same_place if p.kind in EXPECTED)
        return f"{path}: expected {' or '.join(expected)}, got {describe(value)}"
    message = problem.message.removeprefix("Value error, ")
    if problem.kind in ("value_error", "assertion_error"):
        return f"{path}: {message}" if path else message
    return f"{path}: {message[:1].lower()}{message[1:]}, got {describe(value)}"
