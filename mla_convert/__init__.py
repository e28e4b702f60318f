"""Convert causal video diffusion transformers to multi-head latent attention."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public classes on first access, because commands must not wait for PyTorch."""
    if name == "StreamingMLAPipeline":
        from .run.pipeline import StreamingMLAPipeline

        return StreamingMLAPipeline
    if name == "SelfForcingGenerator":
        from .run.generator import SelfForcingGenerator

        return SelfForcingGenerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
