"""Generates video with a converted or a dense model, chunk by chunk."""
