"""Whether clips fit a model, told from one of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import UsageError
from ..families.base import Config, noise_channels
from ..load import Source
from ..run.image import reads_image


def check_alike(real_score: Source, source: Source) -> None:
    """Raise UsageError unless a real score reads the latents and prompts of the source."""
    for name, what in (("in_channels", "latents"), ("text_dim", "prompts")):
        mine, theirs = source.config[name], real_score.config[name]
        if mine != theirs:
            raise UsageError(
                f"real_score: {real_score.origin} takes {what} of {theirs} channels, {source.origin} of {mine} ({name})"
            )


def check_text_to_video(config: Config, origin: str) -> None:
    """Raise UsageError for a model that is conditioned on an image, which clips do not hold."""
    if reads_image(config):
        raise UsageError(
            f"{origin} is an image-to-video model ({config['in_channels']} channels in, {noise_channels(config)} out) "
            "and clips hold no masks and images: `convert` it from its weights alone, with init: svd, or take the "
            "text-to-video model, which continues an image that is written to its cache"
        )


def check_channels(example: Mapping[str, Tensor], source: Source, where: str) -> None:
    """Compare `latents` `[C, F, H, W]` and `encoder_hidden_states` `[L, D]` of one clip with what the model takes.

    Raises UsageError that begins with `where`, the name of the data, or that names an image-to-video model.
    """
    check_text_to_video(source.config, source.origin)
    for key, axis, name in (("latents", 0, "in_channels"), ("encoder_hidden_states", 1, "text_dim")):
        size = example[key].shape[axis]
        if size != source.config[name]:
            raise UsageError(
                f"{where}: {key} have {size} channels, {source.origin} takes {source.config[name]} ({name})"
            )
