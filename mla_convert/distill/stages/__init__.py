"""Distillation stages, one a file; each exports its class as the constant STAGE."""
