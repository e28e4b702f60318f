"""Convert a dense causal transformer to latent attention, before any training."""

from .clips import CalibrationBatch, clip_batches
from .config import ConvertConfig
from .streaming import Converted, convert_source
from .surgery import convert_model

__all__ = ["CalibrationBatch", "ConvertConfig", "Converted", "clip_batches", "convert_model", "convert_source"]
