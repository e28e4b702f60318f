"""Convert causal video diffusion transformers to multi-head latent attention.

The public classes are imported on first access, because commands must not wait for PyTorch.
"""

from typing import TYPE_CHECKING

from .lazy import on_access

if TYPE_CHECKING:
    from .run.generator import SelfForcingGenerator as SelfForcingGenerator
    from .run.pipeline import StreamingMLAPipeline as StreamingMLAPipeline

__version__ = "0.1.0"

__getattr__, __dir__ = on_access(
    __name__, {"SelfForcingGenerator": "run.generator", "StreamingMLAPipeline": "run.pipeline"}
)
