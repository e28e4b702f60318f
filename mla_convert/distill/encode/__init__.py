"""Encodes videos with captions, or only prompts, into the files that stages train on."""

from .config import EncodeConfig
from .run import encode_prompts, encode_videos

__all__ = ["EncodeConfig", "encode_prompts", "encode_videos"]
