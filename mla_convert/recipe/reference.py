"""Generate the reference of all recipe keys in Markdown from the classes that define them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..distill.stages.base import StageConfig
from ..explain import models_in
from ..registry import stages
from .schema import Recipe

# Keys are class names of annotated-types, pydantic's dependency for constraints.
_BOUNDS = {"Ge": "at least", "Gt": "above", "Le": "at most", "Lt": "below"}
HEAD = """# Recipe keys

This page lists every key of a recipe, with its type and default; any other key is refused. `mla-convert recipes
reference` prints this page. Paths are relative to the folder that a command is run in. A data type may also be written
`fp32`, `bf16` or `fp16`.
"""


def reference() -> str:
    """The whole page: the recipe, its sections (each followed by its subsections), and the stages."""
    parts = [HEAD, *_section("Recipe", Recipe, "")]
    parts += ["## distill\n", "A list of stages, in the order in which they run.\n"]
    parts += _section("every stage", StageConfig, "distill[]", level=3)
    for name, stage in sorted(stages().items()):
        own = [key for key in stage.config_class.model_fields if key not in StageConfig.model_fields]
        changed = [
            key
            for key, field in stage.config_class.model_fields.items()
            if key in StageConfig.model_fields and _default(field) != _default(StageConfig.model_fields[key])
        ]
        parts += _section(f"stage: {name}", stage.config_class, "distill[]", level=3, only=[*changed, *own])
    return "\n".join(parts)


def _section(
    title: str, model: type[BaseModel], path: str, level: int = 2, only: list[str] | None = None
) -> Iterator[str]:
    """Yield a heading, the class docstring and a table of keys, then the same for the sections inside."""
    yield f"{'#' * level} {title}\n"
    yield f"{_words(model)}\n"
    fields = {key: field for key, field in model.model_fields.items() if only is None or key in only}
    if fields:
        rows = [f"| `{key}` | {_type(field)} | {_shown(field)} |" for key, field in fields.items()]
        yield "\n".join(["| key | type | default |", "| --- | --- | --- |", *rows]) + "\n"
    for key, field in fields.items():
        inner = next(iter(models_in(field.annotation)), None)
        if inner is not None and not issubclass(inner, StageConfig):
            where = f"{path}.{key}" if path else key
            yield from _section(where, inner, where, level=min(level + bool(path), 4))


def _words(model: type[BaseModel]) -> str:
    """The docstring of a class with each paragraph on one line."""
    text = inspect.cleandoc(model.__doc__ or "")
    return "\n\n".join(" ".join(block.split()) if not _is_list(block) else block for block in text.split("\n\n"))


def _is_list(block: str) -> bool:
    return block.lstrip().startswith("- ")


def _type(field: FieldInfo) -> str:
    """Describe the type of a key in words, with its bounds."""
    shown = _name(field.annotation)
    rules = [(type(rule).__name__, rule) for rule in field.metadata]
    bounds = [f"{_BOUNDS[name]} {_bound(getattr(rule, name.lower()))}" for name, rule in rules if name in _BOUNDS]
    return ", ".join([shown, *bounds])


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _name(annotation: Any) -> str:
    """Describe a type in words: `int or null`, `list of str`."""
    arguments, origin = get_args(annotation), get_origin(annotation)
    if origin is Annotated:
        return _name(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_name(argument) for argument in arguments)
    if origin is dict:
        return f"{_name(arguments[1])} by name"
    if origin in (tuple, list):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        several = origin is tuple and Ellipsis not in arguments
        return f"[{', '.join(map(_name, inner))}]" if several else f"list of {_name(inner[0])}"
    if annotation is type(None):
        return "null"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "section"
    return str(getattr(annotation, "__name__", annotation))


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})


def _shown(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = _default(field)
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None:
        return "null"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
