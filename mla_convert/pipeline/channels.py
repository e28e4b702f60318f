"""Whether clips fit a model, told from one of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import UsageError
from ..load import Source


def check_alike(real_score: Source, source: Source) -> None:
    """Raise UsageError unless a real score reads the latents and prompts of the source."""
    for name, what in (("in_channels", "latents"), ("text_dim", "prompts")):
        mine, theirs = source.config[name], real_score.config[name]
        if mine != theirs:
            raise UsageError(
                f"real_score: {real_score.origin} takes {what} of {theirs} channels, {source.origin} of {mine} ({name})"
            )


def check_channels(example: Mapping[str, Tensor], source: Source, where: str) -> None:
    """Compare `latents` `[C, F, H, W]` and `encoder_hidden_states` `[L, D]` of one clip with what the model takes.

    Raises UsageError that begins with `where`, the name of the data, or that names an image-to-video model.
    """
    taken, made = source.config["in_channels"], source.config["out_channels"] or source.config["in_channels"]
    if taken != made:
        raise UsageError(
            f"{source.origin} is an image-to-video model ({taken} channels in, {made} out) and clips hold no masks and "
            "images; take the text-to-video model, which continues an image that is written to its cache"
        )
    for key, axis, name in (("latents", 0, "in_channels"), ("encoder_hidden_states", 1, "text_dim")):
        size = example[key].shape[axis]
        if size != source.config[name]:
            raise UsageError(
                f"{where}: {key} have {size} channels, {source.origin} takes {source.config[name]} ({name})"
            )
