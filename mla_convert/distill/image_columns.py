"""Converts a clip's image conditions to and from the columns of FastVideo's image-to-video schema.

`first_frame_latent` `[C, f, H, W]` encodes a video that begins with the image and is gray after it. It is always
normalized, even if the clip's own latents are raw. The mask is not stored. Frames of the clip after the first f
equal the last stored one. `clip_feature` `[L, D]` holds the image's CLIP tokens, the second-to-last hidden
states. Source: FastVideo, `fastvideo/pipelines/preprocess/preprocess_pipeline_i2v.py` and
`fastvideo/pipelines/stages/image_encoding.py`; there, f is all frames of the clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ..errors import UserError
from ..mla.image import IMAGE, MASK_CHANNELS, TOKENS, with_mask

COLUMN_OF = {IMAGE: "first_frame_latent", TOKENS: "clip_feature"}
UNLIKE = 0.3
"""The relative difference above which the first latent frame of an image is not that of its clip.

Both encode the same frame, so they differ only by the rounding in encoding and storage.
"""


def to_column(name: str, condition: Tensor) -> Tensor:
    """The tensor that a condition's column stores: `image_latents` `[4 + C, f, H, W]` without the mask channels."""
    return condition[MASK_CHANNELS:] if name == IMAGE else condition


def from_column(name: str, column: Tensor, frames: int) -> Tensor:
    """The condition `[4 + C, F, H, W]` or `[L, D]` from a column's tensor, for a clip of F `frames`."""
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
    """Raise UserError unless the columns' `shapes`, by condition, fit a clip with latents of shape `latent`.

    `first` has the shapes of the first clip. `own` says that this tool wrote the shard; only then may f be below F.
    """
    for name, shape in shapes.items():
        column = COLUMN_OF[name]
        if not shape:
            raise UserError(f"{place} has no {column}, but other clips have one; encode it again or remove it")
        if name == TOKENS and (len(shape) != 2 or list(shape) != list(first[name])):
            raise UserError(
                f"{place} has a {column} of {size_text(shape)}, the first clip has {size_text(first[name])}; encode it "
                "again"
            )
        if name != IMAGE:
            continue
        # Refuses latents of another encoder, of the image alone, or concatenated with a mask.
        fits = len(shape) == 4 and [shape[0], *shape[2:]] == [latent[0], *latent[2:]]
        if not fits or shape[1] > latent[1] or (shape[1] < latent[1] and not own):
            raise UserError(
                f"{place} has a {column} of {size_text(shape)}, which does not match its latents of "
                f"{size_text(latent)}; encode the videos with `mla-convert encode --image-condition`"
            )


def check_first_frame(latents: Tensor, image: Tensor, place: str) -> None:
    """Raise UserError unless `image_latents` `[4 + C, F, H, W]` begin like the clip's latents `[C, F, H, W]`.

    The encoder is causal, so the first latent frame depends only on the first video frame.
    """
    own, other = latents[:, 0], image[MASK_CHANNELS:, 0]
    if float((other - own).norm()) > UNLIKE * float(own.norm()):
        raise UserError(
            f"{place} has a {COLUMN_OF[IMAGE]} that does not begin like its vae_latent: it is not normalized, or is of "
            "another image; encode the videos with `mla-convert encode --image-condition`"
        )


def missing_columns(folder: object, missing: Iterable[str]) -> UserError:
    """The error for a model whose `missing` conditions the clips in `folder` do not hold."""
    names = " and ".join(COLUMN_OF[name] for name in missing)
    return UserError(
        f"the model is conditioned on an image, but the clips in {folder} hold no {names}; encode the videos with "
        "`mla-convert encode --image-condition` and the model's own pipeline as --components, or train the "
        "text-to-video model"
    )


def size_text(shape: Sequence[int]) -> str:
    """A shape for messages, such as `16x21x60x104`."""
    return "x".join(map(str, shape))
