"""Reads what a data-free run rolls out: prompts, embeddings, or the captions and images of clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import default_collate

from ..distill.data import DataConfig
from ..distill.latents import LatentShards
from ..distill.rollouts import Captions, RolloutsConfig
from ..distill.shard_files import of_all
from ..distill.shard_index import ShardIndex, holds_shards
from ..errors import UsageError, UserError
from ..families.image import needed_conditions
from ..files import sha256
from ..load import Source
from ..mla.conditions import conditions_of
from ..mla.image import IMAGE
from ..run.latents import DIGITS, prompt_encoder
from ..run.sample import embed_prompts, prompt_files
from .rollout_texts import ClipCaptions, ClipTexts, NoCaptions, TextFiles


@dataclass(frozen=True)
class Prompts:
    """Embeddings `text` `[N, L, D]` with their `captions`, which are "" if only embeddings are stored.

    Embeddings on disk are read row by row. `clips` are the clips that captions come from, if any. For a model that is
    conditioned on images (`images`), these come from the clips as well.
    """

    text: Tensor | TextFiles | ClipTexts
    captions: Captions
    clips: LatentShards | None = None
    images: bool = False

    def conditions(self, chosen: Sequence[int], frames: int) -> dict[str, Tensor]:
        """Image conditions `[n, ...]` by name for the prompts with the indices `chosen`, cut to `frames` frames."""
        if self.clips is None or not self.images:
            return {}
        stacked: dict[str, Tensor] = default_collate([conditions_of(self.clips.read(number)) for number in chosen])
        return {name: x[:, :, :frames] if name == IMAGE else x for name, x in stacked.items()}

    def digests(self) -> Mapping[str, list[str]]:
        """SHA-256 digests of the files that hold the images, if any."""
        if self.clips is None or not self.images:
            return {}
        return {"images": of_all(sha256, self.clips.paths)}

    @property
    def index(self) -> ShardIndex | None:
        """The index of the clips, which other processes pass to `read_prompts`."""
        return None if self.clips is None else self.clips.index


def read_prompts(data: DataConfig, source: Source, index: ShardIndex | None = None) -> Prompts:
    """Open or embed the prompts of `data.rollouts`; `index` is that of their clips, if another process has it.

    Raises UsageError for prompts that do not fit the model, UserError for files that cannot be read.
    """
    config = data.rollouts
    assert config is not None
    embeds = None if config.prompt_embeds is None else Path(config.prompt_embeds)
    if embeds is not None and holds_shards(embeds):
        return _of_clips(embeds, data, config, source, index)
    if needed_conditions(source.config):
        raise UsageError(
            "data.rollouts: the model is conditioned on an image, and prompts alone have none; set prompt_embeds to a "
            "folder of clips that `mla-convert encode --image-condition` wrote"
        )
    if embeds is None:
        if prompt_encoder(source.config) != DIGITS:
            raise UsageError(
                "data.rollouts.prompts: only digits models read prompts without a text encoder; encode them with "
                "`mla-convert encode --prompts` and set prompt_embeds to its output"
            )
        try:
            return Prompts(embed_prompts(config.prompts), config.prompts)
        except UsageError as error:
            raise UsageError(f"data.rollouts.prompts: {error}") from None
    return Prompts(TextFiles(prompt_files(embeds), source.config["text_dim"]), NoCaptions())


def _of_clips(
    path: Path, data: DataConfig, config: RolloutsConfig, source: Source, index: ShardIndex | None
) -> Prompts:
    """The captions of a folder of clips, with their images if the model reads them."""
    needed = needed_conditions(source.config)
    # Without images no latent is read, whatever it was normalized with.
    latents = data.latents if needed else "normalized"
    clips = LatentShards(path, data.text_tokens, latents, needed, index, index is not None, skippable=False)
    encoded_frames = clips.read(0)["latents"].shape[1]
    if needed and config.num_frames > encoded_frames:
        raise UserError(
            f"data.rollouts.num_frames: the images in {path} are encoded for {encoded_frames} latent frames; lower "
            f"{config.num_frames} to that or encode longer clips"
        )
    text = ClipTexts(clips, min(len(clips), config.clips))
    return Prompts(text, ClipCaptions(clips), clips, images=bool(needed))
