"""Distillation: the training data, the stages with their losses, and the trainer that runs any stage."""
