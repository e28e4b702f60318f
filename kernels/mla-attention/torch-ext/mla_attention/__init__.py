"""Fused Triton kernels for multi-head latent attention over a ring of cached video frames."""
