"""Gives a constructor the signature of a stock model without repeating its twenty parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def takes(stock: type[Any], **extra: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that gives `__init__(self, **config)` the signature of `stock` plus the defaults in `extra`.

    diffusers reads the configuration keys from that signature, so this goes below `register_to_config`. The constructor
    receives every parameter by name, with defaults filled in.
    """
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in extra.items()]
    stock_signature = inspect.signature(stock.__init__)
    signature = stock_signature.replace(parameters=[*stock_signature.parameters.values(), *own])

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def bound(self: Any, *args: Any, **kwargs: Any) -> None:
            call = signature.bind(self, *args, **kwargs)
            call.apply_defaults()
            init(**call.arguments)

        vars(bound)["__signature__"] = signature
        return bound

    return decorate
