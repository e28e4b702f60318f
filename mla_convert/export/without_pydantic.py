"""Implements the subset of pydantic that the models' configurations use, with the standard library only.

It replaces pydantic in the self-contained file of a model. A configuration accepts, refuses and dumps the same
values. Supported types are bool, int, float, str, None, Literal, tuples and unions of these.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FieldInfo:
    """Default and lower bound of a field."""

    default: Any
    ge: float | None = None


def Field(default: Any, *, ge: float | None = None) -> Any:
    """Declare a field with a default and a lower bound."""
    return FieldInfo(default, ge)


def ConfigDict(**settings: Any) -> dict[str, Any]:
    """The settings of a configuration; `BaseModel` supports only one set of them."""
    return settings


def model_validator(*, mode: typing.Literal["after"]) -> Callable[[Any], Any]:
    """Mark a method that checks a whole configuration and raises ValueError."""

    def mark(method: Any) -> Any:
        method.checks_configuration = mode == "after"
        return method

    return mark


class BaseModel:
    """A frozen configuration whose annotated names are its fields. Raises ValueError for invalid keys or values."""

    model_config: typing.ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        if cls.model_config != {"extra": "forbid", "frozen": True}:
            raise TypeError(f"{cls.__name__} is not a frozen configuration that forbids unknown keys")

    def __init__(self, **values: Any) -> None:
        fields = self._fields()
        name = type(self).__name__
        unknown = sorted(values.keys() - fields.keys())
        if unknown:
            raise ValueError(f"{name}: {unknown[0]} is not a key; the keys are {', '.join(fields)}")
        for key, hint in fields.items():
            declared = getattr(type(self), key, FieldInfo(...))
            info = declared if isinstance(declared, FieldInfo) else FieldInfo(declared)
            if key not in values and info.default is ...:
                raise ValueError(f"{name}: {key} is missing")
            value = fitting(values[key], hint, f"{name}: {key}") if key in values else info.default
            if info.ge is not None and value is not None and value < info.ge:
                raise ValueError(f"{name}: {key} must be at least {info.ge}, got {value}")
            vars(self)[key] = value
        for method in vars(type(self)).values():
            if getattr(method, "checks_configuration", False):
                method(self)

    @classmethod
    def _fields(cls) -> dict[str, Any]:
        hints = typing.get_type_hints(cls)
        return {key: hint for key, hint in hints.items() if typing.get_origin(hint) is not typing.ClassVar}

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError(f"{type(self).__name__} is frozen: {name} cannot be set")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"

    def model_dump(self, mode: typing.Literal["python", "json"] = "python") -> dict[str, Any]:
        """The fields as a dict; in `json` mode tuples become lists."""
        return {key: as_lists(value) if mode == "json" else value for key, value in vars(self).items()}


def as_lists(value: Any) -> Any:
    """`value` with tuples replaced by lists."""
    return [as_lists(entry) for entry in value] if isinstance(value, tuple) else value


def fitting(value: Any, hint: Any, where: str) -> Any:
    """`value` converted to an annotation's type, lists as tuples. Raises ValueError that names `where`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            try:
                return fitting(value, choice, where)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
    elif origin is tuple and arguments[1:] == (...,):
        if isinstance(value, list | tuple):
            return tuple(fitting(entry, arguments[0], where) for entry in value)
    elif hint in (bool, int, float, str, type(None)):
        if type(value) is hint:
            return value
        if hint is float and type(value) is int:
            return float(value)
    else:
        raise TypeError(f"{where}: the type {hint} is not supported")
    raise ValueError(f"{where} cannot be {value!r}")
