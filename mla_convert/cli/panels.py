"""Groups the options of a command in its help."""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from typer.core import TyperCommand, TyperOption

Function = TypeVar("Function", bound=Callable[..., Any])

SAMPLING = (
    "steps",
    "sampler",
    "denoising_steps",
    "first_chunk_steps",
    "shift",
    "guidance_scale",
    "context_noise",
    "seed",
)
EXECUTION = ("dtype", "vae_dtype", "offload", "kernels", "expand_history", "cuda_graph", "cache")
_REST = "Other"


def in_panels(panels: Mapping[str, Sequence[str]]) -> Callable[[Function], Function]:
    """Show a command's options in panels, given as a title and the names of parameters.

    Options that commands share are copied, so that only this command's help changes. Raises KeyError for a name that
    is no parameter.
    """

    def grouped(command: Function) -> Function:
        hints = typing.get_type_hints(command, include_extras=True)
        for title, names in panels.items():
            for name in names:
                kind, option = typing.get_args(hints[name])
                option = copy.copy(option)
                option.rich_help_panel = title
                hints[name] = Annotated[kind, option]
        command.__annotations__ = hints
        return command

    return grouped


class Command(TyperCommand):
    """A command that shows the options without a panel behind the others; Typer begins with them."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)
        options = [param for param in params if isinstance(param, TyperOption)]
        if any(option.rich_help_panel for option in options):
            for option in options:
                option.rich_help_panel = option.rich_help_panel or _REST
        return params
