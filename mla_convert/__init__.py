"""Convert causal video diffusion transformers to multi-head latent attention."""

__version__ = "0.1.0"
