"""Distillation: data, losses in stages, and the trainer that knows none of them."""
