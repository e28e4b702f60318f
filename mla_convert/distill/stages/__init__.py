"""Distillation stages, one per file; each file exports its class as the constant STAGE."""
