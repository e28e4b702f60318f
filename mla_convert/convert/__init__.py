"""From a dense causal transformer to one with latent attention, before any training."""

from .calibrate import CalibrationBatch
from .config import ConvertConfig
from .surgery import convert_model

__all__ = ["CalibrationBatch", "ConvertConfig", "convert_model"]
