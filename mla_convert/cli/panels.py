"""Groups the options of a command in its help."""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

Command = TypeVar("Command", bound=Callable[..., Any])


def in_panels(panels: Mapping[str, Sequence[str]]) -> Callable[[Command], Command]:
    """Show a command's options in panels, given as a title and the names of parameters; the rest stays in `Options`.

    Options that commands share are copied, so that only this command's help changes. Raises KeyError for a name that
    is no parameter.
    """

    def grouped(command: Command) -> Command:
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
