"""Whether clips fit a model, told from one of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import UsageError
from ..families.base import noise_channels
from ..families.image import IMAGE, TOKENS, needed_conditions, refuse_last_image
from ..load import Source


def check_alike(real_score: Source, source: Source) -> None:
    """Raise UsageError unless a real score reads the latents and prompts of the source."""
    for name, what in (("in_channels", "latents"), ("text_dim", "prompts")):
        mine, theirs = source.config[name], real_score.config[name]
        if mine != theirs:
            raise UsageError(
                f"real_score: {real_score.origin} takes {what} of {theirs} channels, {source.origin} of {mine} ({name})"
            )
    read = [" and ".join(needed_conditions(one.config)) or "no image" for one in (real_score, source)]
    if read[0] != read[1]:
        raise UsageError(f"real_score: {real_score.origin} reads {read[0]}, {source.origin} {read[1]}")


def check_channels(example: Mapping[str, Tensor], source: Source, where: str) -> None:
    """Compare one clip with what the model takes: `latents` `[C, F, H, W]`, `encoder_hidden_states` `[L, D]`, and of
    an image `image_latents` `[c, F, H, W]` and `encoder_hidden_states_image` `[L, D]`.

    Raises UsageError that begins with `where`, the name of the data, or for a model that reads two images.
    """
    config = source.config
    refuse_last_image(config)
    made, read = noise_channels(config), config["in_channels"]
    wanted = {
        "latents": (0, made, "in_channels" if made == read else "out_channels"),
        "encoder_hidden_states": (1, config["text_dim"], "text_dim"),
        IMAGE: (0, read - made, "in_channels less out_channels"),
        TOKENS: (1, config.get("image_dim"), "image_dim"),
    }
    for key, (axis, expected, name) in wanted.items():
        if key in example and example[key].shape[axis] != expected:
            size = example[key].shape[axis]
            raise UsageError(f"{where}: {key} have {size} channels, {source.origin} takes {expected} ({name})")
