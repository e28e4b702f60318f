"""Latent attention for causal video: configuration, positions, attention and caches."""
