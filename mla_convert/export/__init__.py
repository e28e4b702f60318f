"""Writes converted models as diffusers checkpoints with a manifest and a model card."""
