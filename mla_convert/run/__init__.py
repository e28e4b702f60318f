"""Streaming generation with a converted or a dense model."""
