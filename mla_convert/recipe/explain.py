"""Pydantic's validation errors as one line that names the key and the remedy."""

from __future__ import annotations

import difflib
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

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
    """A value as the reader of a recipe sees it: `'abc' (a string)`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    if isinstance(value, dict):
        return "a section of keys"
    if isinstance(value, list):
        return "a list"
    kind = {int: "an integer", float: "a number", str: "a string"}.get(type(value), type(value).__name__)
    return f"{value!r} ({kind})"


def nearest(word: str, valid: list[str]) -> str:
    """`did you mean X?`, or the valid words where none is near."""
    matches = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else f"valid here: {', '.join(valid)}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation such as `list[X] | None` can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]


def _model_at(root: type[BaseModel], location: tuple[str | int, ...]) -> type[BaseModel] | None:
    """The model whose field the last entry of a location is."""
    current: type[BaseModel] | None = root
    for entry in location[:-1]:
        if current is None or entry not in current.model_fields:
            continue
        found = _models(current.model_fields[str(entry)].annotation)
        current = found[0] if found else None
    return current


def explain(error: ValidationError, root: type[BaseModel], prefix: str = "") -> str:
    """One line for a failed validation of `root`, found at dotted path `prefix` of the recipe."""
    details = error.errors(include_url=False)
    # An unknown key is most often the cause of a missing one.
    first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    line = _explain_one(first, root, prefix)
    if len(details) > 1:
        line += f" (and {len(details) - 1} more)"
    return line


def _explain_one(detail: Any, root: type[BaseModel], prefix: str) -> str:
    kind, location, value = detail["type"], detail["loc"], detail["input"]
    path = ".".join([prefix, *map(str, location)] if prefix else map(str, location))
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        model = _model_at(root, location)
        valid = list(model.model_fields) if model else []
        return f"unknown key {path}; {nearest(str(location[-1]), valid)}"
    if kind == "missing":
        return f"missing key {path}"
    if kind == "literal_error":
        expected = context["expected"]
        hint = ""
        if isinstance(value, str):
            matches = difflib.get_close_matches(value, [word.strip("' ") for word in expected.split(",")], n=1)
            hint = f"; did you mean {matches[0]}?" if matches else ""
        return f"{path}: expected {expected}, got {describe(value)}{hint}"
    if kind in EXPECTED:
        return f"{path}: expected {EXPECTED[kind]}, got {describe(value)}"
    message = detail["msg"].removeprefix("Value error, ")
    if kind in ("value_error", "assertion_error"):
        return f"{path}: {message}" if path else message
    return f"{path}: {message[:1].lower()}{message[1:]}, got {describe(value)}"
