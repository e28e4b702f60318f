"""From a dense causal transformer to one with latent attention, before any training."""

from .clips import CalibrationBatch
from .config import ConvertConfig
from .streaming import Converted, convert_source
from .surgery import convert_model

__all__ = ["CalibrationBatch", "ConvertConfig", "Converted", "convert_model", "convert_source"]
