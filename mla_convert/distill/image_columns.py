"""What an image-to-video model reads of a clip's image, in the columns of FastVideo's image-to-video schema.

`first_frame_latent` `[C, f, H, W]` is the encoding of a clip that begins with the image and is grey after it, as
transformers take it: normalised, also where the clip's own latents are raw. The mask is not stored, and frames behind
the f first ones, up to those of the clip, are like the last. `clip_feature` `[L, D]` are the image's CLIP tokens, the
last hidden states but one. Source: FastVideo, `fastvideo/pipelines/preprocess/preprocess_pipeline_i2v.py` and
`fastvideo/pipelines/stages/image_encoding.py`, whose f are all frames of the clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ..errors import UserError
from ..families.image import IMAGE, MASK_CHANNELS, TOKENS, with_mask

COLUMN_OF = {IMAGE: "first_frame_latent", TOKENS: "clip_feature"}
UNLIKE = 0.3
"""The relative difference above which the first latent frame of an image is not that of its clip.

Both are the encoding of one frame, so that they differ by the rounding of how they were encoded and stored.
"""


def stored(name: str, condition: Tensor) -> Tensor:
    """The tensor of a condition's column: of `image_latents` `[4 + C, f, H, W]` what lies behind the mask."""
    return condition[MASK_CHANNELS:] if name == IMAGE else condition


def taken(name: str, column: Tensor, frames: int) -> Tensor:
    """The condition `[4 + C, F, H, W]` or `[L, D]` in a column's tensor, for a clip of F `frames`."""
    if name != IMAGE:
        return column
    last = column.shape[1] - 1
    return with_mask(column[:, [min(frame, last) for frame in range(frames)]])


def check_shapes(
    shapes: Mapping[str, Sequence[int]],
    latent: Sequence[int],
    first: Mapping[str, Sequence[int]],
    place: str,
    own: bool,
) -> None:
    """Raise UserError unless the columns' `shapes`, by condition, fit a clip with latents of the shape `latent`.

    `first` are those of the first clip, `own` says that the shard was written here, where alone frames are left out.
    """
    for name, shape in shapes.items():
        column = COLUMN_OF[name]
        if not shape:
            raise UserError(f"{place} has no {column} and other clips have; encode it again or remove it")
        if name == TOKENS and (len(shape) != 2 or list(shape) != list(first[name])):
            raise UserError(
                f"{place} has a {column} of {_by(shape)}, the first clip {_by(first[name])}; encode it again"
            )
        if name != IMAGE:
            continue
        # Another encoder's latent, the image's alone, or a mask and latents in one are no condition of this kind.
        fits = len(shape) == 4 and [shape[0], *shape[2:]] == [latent[0], *latent[2:]]
        if not fits or shape[1] > latent[1] or (shape[1] < latent[1] and not own):
            raise UserError(
                f"{place} has a {column} of {_by(shape)} beside latents of {_by(latent)}, and that of an image and the "
                "grey frames after it has their shape; encode the videos with `mla-convert encode --image-condition`"
            )


def check_first_frame(latents: Tensor, image: Tensor, place: str) -> None:
    """Raise UserError unless `image_latents` `[4 + C, F, H, W]` begin as the clip's latents `[C, F, H, W]` do.

    The encoder is causal: the first latent frame is that of the first frame alone.
    """
    own, other = latents[:, 0], image[MASK_CHANNELS:, 0]
    if float((other - own).norm()) > UNLIKE * float(own.norm()):
        raise UserError(
            f"{place} has a {COLUMN_OF[IMAGE]} that does not begin as its vae_latent does: it is not normalised, or of "
            "another image; encode the videos with `mla-convert encode --image-condition`"
        )


def none_held(folder: object, missing: Iterable[str]) -> UserError:
    """What a model is told that reads conditions which the clips in `folder` lack."""
    names = " and ".join(COLUMN_OF[name] for name in missing)
    return UserError(
        f"the model is conditioned on an image and the clips in {folder} hold no {names}; encode the videos with "
        "`mla-convert encode --image-condition` and the model's own pipeline as --model, or train the text-to-video "
        "model"
    )


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
