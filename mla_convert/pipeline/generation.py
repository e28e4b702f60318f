"""Stream videos from a checkpoint into files or a pipe, chunk by chunk, in constant memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import default_device
from ..distill.encode.models import image_encoder, load_vae, text_encoder
from ..distill.negative import find_negative, read_negative
from ..distill.progress import Report
from ..errors import UsageError
from ..export.manifest import recorded_recipe
from ..families.base import noise_channels
from ..families.image import reads_tokens
from ..files import atomic_file, check_place, save_tensors
from ..mla.bits import told
from ..recipe.schema import validate
from ..run.config import GenerateConfig
from ..run.decode import first_video_frame, frame_chunks, latent_frames, video_frames
from ..run.decode_memory import reserve
from ..run.image import check_image, image_conditions, read_image
from ..run.offload import Offload, place
from ..run.parts import IMAGE_TOKENS, PICTURES, TEXT, find_parts
from ..run.prefetch import FrameWriter
from ..run.prompts import PromptChange, PromptSchedule
from ..run.sample import (
    DIGITS,
    check_latent_size,
    check_length,
    check_text_width,
    check_vae,
    embed_prompts,
    latent_scale,
    latent_size,
    load_prompt_embeds,
    prompt_encoder,
    rollout,
    shortest,
    to_latent,
    trained_for,
)
from ..run.source_video import SourceVideo, open_source
from ..run.start import LATENTS, read_start
from ..run.streaming import StreamingConfig
from ..run.video import STDOUT, check_suffix
from .experts import load_models, read_model_config


@dataclass(frozen=True)
class Request:
    """What is asked for beside the keys of GenerateConfig.

    `prompts` are texts, one video each; or `prompt_embeds` is a file with the embeddings of one, and
    `negative_embeds` of the negative prompt, by default `negative.safetensors` beside it. `changes` are the
    prompts that follow. `image` is what a model with channels for one is conditioned on. `components` is a folder
    or Hub id of the pipeline that has VAE and encoders.
    `seconds` is the length in place of `num_frames`; an `endless` video ends with Ctrl-C. `size` is height
    and width in pixels. `vae_dtype` is what the VAE decodes in, and encodes a source in; an image and a start are
    encoded in float32. `streaming` are keys of StreamingConfig.
    """

    prompts: tuple[str, ...] = ()
    prompt_embeds: Path | None = None
    changes: tuple[PromptChange, ...] = ()
    negative_embeds: Path | None = None
    image: Path | None = None
    components: str | None = None
    seconds: float | None = None
    endless: bool = False
    size: tuple[int, int] | None = None
    dtype: str | None = None
    vae_dtype: str | None = None
    offload: Offload = "none"
    streaming: Mapping[str, Any] = field(default_factory=dict)


def generate_video(
    folder: Path, out: Path, request: Request, settings: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    """Roll the model in `folder`, or its experts, out for each prompt and write `out`.

    `settings` are keys of GenerateConfig; what is left out is what the model was trained for where
    that is known. A `.safetensors` file gets the latents `[C, F, H, W]` under `latents`, everything else
    the picture. Several prompts make `NAME-00`, `NAME-01` and so on, with the seeds from `seed` on. One
    large model is in memory at a time: the text encoder, then the transformer with its VAE.

    An interrupt ends the videos where they are; they are finished and `interrupted` says so. Raises
    KeyboardInterrupt before the first frame, UserError in one line.
    """
    validate(GenerateConfig, dict(settings))
    task = _Task(folder, out, request, settings)
    embeds, schedule, negative = task.texts()
    tokens = task.image_tokens()
    vae = task.vae()
    start = task.start(vae)
    conditions = task.conditions(vae, tokens)
    if vae is not None and request.vae_dtype is not None:
        # By torch's own method: that of diffusers warns of parts that want float32, of which this VAE has none.
        nn.Module.to(vae, getattr(torch, request.vae_dtype))
    models = load_models(folder, None if request.dtype is None else getattr(torch, request.dtype))
    task.streaming.apply(*models)
    place(models, vae, task.device, request.offload)
    config, count, source = task.config, len(embeds), task.source
    encodes = isinstance(source, SourceVideo) and not task.pixels
    if isinstance(source, SourceVideo) and encodes:
        source.encode_with(vae)
    decoder, encoder = vae if task.pictures else None, vae if encodes else None
    reserve(models, decoder, task.height, task.width, count, task.device, encoder)
    chunks = rollout(
        models,
        embeds,
        config,
        lambda done, total: report("generate", done, total),
        start=start,
        source=source,
        conditions=conditions,
        endless=request.endless,
        seed=config.seed if count == 1 else [config.seed + index for index in range(count)],
        negative_hidden_states=negative,
        prompt_at=schedule,
        device=task.device,
    )
    started = time.monotonic()
    paths = [out] if count == 1 else [out.with_name(f"{out.stem}-{index:02d}{out.suffix}") for index in range(count)]
    write = _write_latents if out.suffix == LATENTS else functools.partial(_write_videos, vae=vae, fps=config.fps)
    frames, interrupted = write(chunks, paths)
    seconds = time.monotonic() - started
    return {
        "path": str(out),
        "paths": [str(path) for path in paths],
        "frames": frames,
        "seconds": round(seconds, 3),
        "frames_per_second": frames / seconds,
        "interrupted": interrupted,
        "cache": told(task.streaming.cache),
        "kernels": [model.kernels.report() for model in models],
    }


class _Task:
    """A request against the model in `folder`: checked before anything large is loaded."""

    def __init__(self, folder: Path, out: Path, request: Request, settings: Mapping[str, Any]) -> None:
        self.request, self.out, self.asked = request, out, settings
        self.root, self.model = read_model_config(folder)
        self.device = default_device()
        self.digits = prompt_encoder(self.model) == DIGITS
        self.temporal, self.spatial, _ = latent_scale(self.model)
        self.pixels = self.spatial == 1
        self.pictures = out.suffix != LATENTS
        check_image(self.model, request.image, "--image", "--start")
        self.image = None if request.image is None else read_image(request.image)
        self._check_out()
        self.streaming = validate(StreamingConfig, {**recorded(self.root, "streaming"), **request.streaming})
        known = {**trained_for(recorded(self.root, "generate"), self.digits), **settings}
        if request.size is not None:
            known["latent_height"] = to_latent("height", request.size[0], self.spatial)
            known["latent_width"] = to_latent("width", request.size[1], self.spatial)
        if request.seconds is not None:
            fps = validate(GenerateConfig, known).fps
            known["num_frames"] = latent_frames(video_frames(request.seconds, fps), self.temporal)
        self.config = validate(GenerateConfig, known)
        self.height, self.width = latent_size(self.model, self.config)
        check_latent_size(self.model, self.height, self.width, self.spatial)
        self.source = self._source()
        # None where nobody knows it.
        self.frames = None if request.endless else shortest(self.config.num_frames, self.source)
        if self.frames is not None:
            check_length(self.model, self.frames)
            self._check_changes(self.frames)

    def _source(self) -> Tensor | SourceVideo | None:
        """What is restyled: latents `[1, C, F, H, W]`, or pictures that are not encoded yet."""
        if self.config.source is None:
            return None
        shape = (noise_channels(self.model), self.height, self.width)
        return open_source(Path(self.config.source), shape, (self.temporal, self.spatial), self.config.fps)

    def _check_changes(self, frames: int) -> None:
        length = first_video_frame(frames, self.temporal) / self.config.fps
        late = next((change for change in self.request.changes if change.seconds >= length), None)
        if late is not None:
            raise UsageError(
                f"the prompt at {late.seconds:g} seconds comes after the end of the video, which is {length:.4g} "
                "seconds long; give an earlier time or more --seconds"
            )

    def _check_out(self) -> None:
        out, request = self.out, self.request
        if self.pictures:
            check_suffix(out)
        if out != STDOUT:
            check_place(out, folder=out.suffix == "")
        if out == STDOUT and len(request.prompts) > 1:
            raise UsageError("stdout takes one video; give one prompt, or a file")
        if request.endless and out.suffix.lower() in (LATENTS, ".gif"):
            raise UsageError(f"a {out.suffix} file is kept in memory until its end; write .mp4, a folder or -")

    def texts(self) -> tuple[Tensor, PromptSchedule | None, Tensor | None]:
        """Embeddings `[B, L, D]` of the prompts, those that follow, and the negative `[1, L, D]` if there is one."""
        request, config = self.request, self.config
        told = [*request.prompts, *(change.prompt for change in request.changes)]
        stored = self._negative_file()
        negative = [] if stored is not None or config.guidance_scale == 1 else [config.negative_prompt or ""]
        if self.digits or not told:
            # The empty prompt of digits is zeros, which is the rollout's own default.
            negative = [text for text in negative if text]
        if config.guidance_scale != 1 and stored is None and not negative and not self.digits:
            raise UsageError("guidance needs a negative prompt; give --negative-embeds or --guidance-scale 1")
        embedded = self._embed([*told, *negative])
        count = len(request.prompts)
        if request.prompt_embeds is not None:
            first = load_prompt_embeds(request.prompt_embeds, self.model["text_dim"])[:1]
        else:
            first = torch.stack(embedded[:count])
        later = [text.unsqueeze(0) for text in embedded[count : len(told)]]
        times = [change.seconds for change in request.changes]
        schedule = PromptSchedule(list(zip(times, later, strict=True)), config.fps, self.temporal) if later else None
        if stored is not None:
            return first, schedule, read_negative(stored, first.shape[1:]).unsqueeze(0)
        return first, schedule, embedded[-1].unsqueeze(0) if negative else None

    def _negative_file(self) -> Path | None:
        """Where the embedding of the negative prompt lies, if guidance needs it and it need not be encoded."""
        embeds, asked = self.request.prompt_embeds, self.request.negative_embeds
        if asked is not None or embeds is None or "negative_prompt" in self.asked or self.config.guidance_scale == 1:
            return asked
        return find_negative(embeds)

    def _embed(self, prompts: Sequence[str]) -> list[Tensor]:
        if not prompts:
            return []
        if self.digits:
            return list(embed_prompts(prompts, DIGITS))
        parts = find_parts(self.root, TEXT, self.request.components)
        if parts is None:
            raise UsageError(
                "this checkpoint has no text encoder; give --components, a folder or Hub id of its pipeline, "
                "or --prompt-embeds and --negative-embeds, .safetensors files"
            )
        with text_encoder(parts, torch.bfloat16, self.device) as embed:
            embeds = [embed([prompt])[0].float() for prompt in prompts]
        check_text_width(embeds[0].shape[1], self.model, parts)
        return embeds

    def vae(self) -> Any:
        """The VAE, on the CPU, where pictures come in or go out of latents; else None."""
        start = self.config.start
        encodes = self.image is not None or (start is not None and Path(start).suffix != LATENTS)
        encodes = encodes or isinstance(self.source, SourceVideo)
        if self.pixels or not (self.pictures or encodes):
            return None
        parts = find_parts(self.root, PICTURES, self.request.components)
        encoded = "image" if self.image is not None else "source" if isinstance(self.source, SourceVideo) else None
        if parts is None and encoded is not None:
            raise UsageError(
                f"this checkpoint has no VAE, which encodes the {encoded}; give --components, a folder or Hub id of "
                "its pipeline"
            )
        if parts is None:
            raise UsageError(
                "the model makes latents and this checkpoint has no VAE; give --components, a folder or Hub id of "
                f"its pipeline, or write {self.out.with_suffix(LATENTS).name if self.out != STDOUT else LATENTS}"
            )
        vae = load_vae(parts)
        check_vae(vae, self.model, f"the VAE in {parts}", "give --components")
        return vae

    def start(self, vae: Any) -> Tensor | None:
        """The clean beginning `[1, C, F0, H, W]`."""
        path = self.config.start
        if path is None:
            return None
        if vae is not None:
            vae.to(self.device)
        start = read_start(Path(path), noise_channels(self.model), self.height, self.width, vae).unsqueeze(0)
        if vae is not None:
            vae.to("cpu")
        return start

    def image_tokens(self) -> Tensor | None:
        """The CLIP tokens `[1, 257, D]` of the image, where the model reads them."""
        if self.image is None or not reads_tokens(self.model):
            return None
        parts = find_parts(self.root, IMAGE_TOKENS, self.request.components)
        if parts is None:
            raise UsageError(
                "this checkpoint has no image encoder, whose tokens the model reads; give --components, a folder or "
                "Hub id of its pipeline"
            )
        with image_encoder(parts, self.device) as embed:
            return embed(self.image)

    def conditions(self, vae: Any, tokens: Tensor | None) -> dict[str, Any] | None:
        """What the model is conditioned on beside text."""
        if self.image is None:
            return None
        vae.to(self.device)
        conditions = image_conditions(self.model, self.image, vae, self.height, self.width, self.frames, tokens)
        vae.to("cpu")
        return conditions


def recorded(root: Path, section: str) -> dict[str, Any]:
    """A section of the recipe that made a checkpoint, as far as it is known."""
    return recorded_recipe(root).get(section) or {}


def _write_latents(chunks: Iterable[Tensor], paths: Sequence[Path]) -> tuple[int, bool]:
    """Latent frames written, and whether an interrupt ended them."""
    made: list[Tensor] = []
    interrupted = False
    try:
        made.extend(chunk.cpu() for chunk in chunks)
    except KeyboardInterrupt:
        if not made:
            raise
        interrupted = True
    videos = torch.cat(made, dim=2)
    for path, latents in zip(paths, videos, strict=True):
        with atomic_file(path) as temporary:
            save_tensors({"latents": latents.contiguous()}, temporary)
    return videos.shape[2], interrupted


def _write_videos(chunks: Iterable[Tensor], paths: Sequence[Path], vae: Any, fps: float) -> tuple[int, bool]:
    """Latent frames written, and whether an interrupt ended them; each file in a thread of its own."""
    counted = _Counted(chunks)
    writers = [FrameWriter(path, fps) for path in paths]
    interrupted = False
    try:
        try:
            for videos in frame_chunks(counted, vae):
                for writer, frames in zip(writers, videos, strict=True):
                    writer.put(frames)
        except KeyboardInterrupt:
            if not writers[0].frames:
                raise
            interrupted = True
        for writer in writers:
            writer.close()
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    return counted.frames, interrupted


class _Counted:
    """Chunks of a rollout, and the number of frames in those that were handed out."""

    def __init__(self, chunks: Iterable[Tensor]) -> None:
        self.chunks, self.frames = chunks, 0

    def __iter__(self) -> Any:
        for chunk in self.chunks:
            self.frames += chunk.shape[2]
            yield chunk
