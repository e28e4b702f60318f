"""What the rollouts of a data-free run are made for: prompts, embeddings, or the captions and images of clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..distill.latents import LatentShards
from ..distill.rollouts import RolloutsConfig
from ..errors import UsageError, UserError
from ..families.image import IMAGE, needed_conditions
from ..files import sha256
from ..load import Source
from ..mla.conditions import conditions_of
from ..run.sample import embed_prompts, load_prompt_embeds, prompt_encoder, prompt_files


@dataclass(frozen=True)
class Prompts:
    """Embeddings `text` `[N, L, D]` with their `captions`, "" where only embeddings are known.

    `clips` are those whose captions they are, for a model that is conditioned on the clips' images.
    """

    text: Tensor
    captions: Sequence[str]
    clips: LatentShards | None = None

    def conditions(self, chosen: Sequence[int], frames: int) -> dict[str, Tensor]:
        """What the model is conditioned on beside the prompts with the numbers `chosen`, `[n, ...]` each."""
        if self.clips is None:
            return {}
        told: dict[str, Tensor] = default_collate([conditions_of(self.clips.read(number)) for number in chosen])
        return {name: x[:, :, :frames] if name == IMAGE else x for name, x in told.items()}

    def digests(self) -> Mapping[str, list[str]]:
        """Digests of the files with the images, if there are some."""
        return {} if self.clips is None else {"images": [sha256(path) for path in self.clips.paths]}


def read_prompts(config: RolloutsConfig, source: Source) -> Prompts:
    """The prompts of `config`.

    Raises UsageError for prompts that the model does not read, UserError for files that cannot be read.
    """
    if config.prompt_embeds is not None and any(Path(config.prompt_embeds).rglob("*.parquet")):
        return _of_clips(Path(config.prompt_embeds), config, source)
    if needed_conditions(source.config):
        raise UsageError(
            "data.rollouts: the model is conditioned on an image, and prompts alone hold none; name a folder of clips "
            "that `mla-convert encode --image-condition` wrote as prompt_embeds"
        )
    if config.prompt_embeds is None:
        try:
            return Prompts(embed_prompts(config.prompts, prompt_encoder(source.config)), config.prompts)
        except UsageError as error:
            raise UsageError(
                f"data.rollouts.prompts: {str(error).replace('--prompt-embeds', 'prompt_embeds')}"
            ) from None
    path = Path(config.prompt_embeds)
    files = prompt_files(path)
    if not files:
        raise UserError(f"no .safetensors files in {path}; write them with `mla-convert encode --prompts`")
    parts = [load_prompt_embeds(file, source.config["text_dim"]) for file in files]
    if len({part.shape[1] for part in parts}) > 1:
        raise UserError(f"the files in {path} have embeddings of different lengths; encode the prompts together")
    text = torch.cat(parts)
    return Prompts(text, [""] * len(text))


def _of_clips(path: Path, config: RolloutsConfig, source: Source) -> Prompts:
    """The captions of a folder of clips, and for a model that reads them their images."""
    needed = needed_conditions(source.config)
    clips = LatentShards(path, conditions=needed)
    chosen = range(min(len(clips), config.clips))
    text = torch.stack([clips.read(number)["encoder_hidden_states"] for number in chosen])
    known = clips.read(0)["latents"].shape[1]
    if needed and config.num_frames > known:
        raise UserError(
            f"data.rollouts.num_frames: the images in {path} are encoded for {known} latent frames; lower "
            f"{config.num_frames} to that or encode longer clips"
        )
    return Prompts(text, [clips.caption(number) for number in chosen], clips if needed else None)
