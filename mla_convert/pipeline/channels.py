"""Checks whether training clips, a real score or a teacher fit a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UsageError
from ..families.base import noise_channels
from ..families.image import needed_conditions, refuse_last_image
from ..load import Source
from ..mla.image import IMAGE, TOKENS

_SHAPE = {
    "in_channels": "input channels",
    "text_dim": "channels of text",
    "num_layers": "layers",
    "num_attention_heads": "heads",
    "attention_head_dim": "channels per head",
}


def check_alike(real_score: Source, source: Source) -> None:
    """Raise UsageError unless the real score takes the same latents, prompts and images as the source."""
    for name, what in (("in_channels", "latents"), ("text_dim", "prompts")):
        ours, theirs = source.config[name], real_score.config[name]
        if ours != theirs:
            raise UsageError(
                f"real_score: {real_score.origin} takes {what} of {theirs} channels, {source.origin} of {ours} ({name})"
            )
    ours, theirs = (" and ".join(needed_conditions(one.config)) or "no image" for one in (source, real_score))
    if ours != theirs:
        raise UsageError(f"real_score: {real_score.origin} reads {theirs}, {source.origin} {ours}")


def check_teacher(teacher: Source, student: Mapping[str, Any], folder: Path) -> None:
    """Raise UsageError unless `teacher` has the shape of the converted model in `folder`, whose configuration is given.

    Reads no weights.
    """
    wrong = [
        f"{teacher.config[name]} {what} and not {student[name]}"
        for name, what in _SHAPE.items()
        if name in student and teacher.config[name] != student[name]
    ]
    if wrong:
        raise UsageError(
            f"the teacher {teacher.origin} has {', '.join(wrong)}; give --teacher the dense model that {folder} was "
            "converted from"
        )


def check_channels(example: Mapping[str, Tensor], source: Source, where: str) -> None:
    """Check that one clip has as many channels as the model takes.

    `example` has `latents` `[C, F, H, W]` and `encoder_hidden_states` `[L, D]`, and for a model conditioned on an image
    `image_latents` `[c, F, H, W]` and `encoder_hidden_states_image` `[L, D]`. Raises UsageError that begins with
    `where`, the name of the data; also for a model that reads two images.
    """
    config = source.config
    refuse_last_image(config)
    generated, read = noise_channels(config), config["in_channels"]
    channels = {
        "latents": (0, generated, "in_channels" if generated == read else "out_channels"),
        "encoder_hidden_states": (1, config["text_dim"], "text_dim"),
        IMAGE: (0, read - generated, "in_channels less out_channels"),
        TOKENS: (1, config.get("image_dim"), "image_dim"),
    }
    for key, (axis, expected, name) in channels.items():
        if key in example and example[key].shape[axis] != expected:
            size = example[key].shape[axis]
            raise UsageError(f"{where}: {key} have {size} channels, {source.origin} takes {expected} ({name})")
