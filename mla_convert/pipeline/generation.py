"""Generates videos with a model in a folder and streams them to files or a pipe, chunk by chunk, in constant memory."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..devices import default_device
from ..distill.encode.models import image_encoder, load_vae, text_encoder
from ..distill.negative import find_negative, read_negative
from ..distill.progress import Report
from ..errors import UsageError
from ..export.components import IMAGE_PARTS
from ..export.manifest import recorded_section
from ..families.base import noise_channels
from ..families.image import reads_tokens
from ..files import atomic_file, check_place, save_tensors
from ..mla.bits import format_bits
from ..mla.parallel import check_group
from ..recipe.schema import validate
from ..run.config import GenerateConfig
from ..run.decode import frame_chunks
from ..run.decode_memory import reserve
from ..run.image import check_image, image_conditions, read_image
from ..run.kept_whole import GIF, KEPT_WHOLE, check_fits
from ..run.latents import (
    DIGITS,
    check_latent_size,
    check_length,
    check_text_width,
    check_vae,
    first_video_frame,
    latent_frames,
    latent_scale,
    latent_size,
    prompt_encoder,
    to_latent,
    video_frames,
)
from ..run.launch import Launch
from ..run.parts import PICTURES, TEXT, find_parts
from ..run.prefetch import FrameWriter
from ..run.prompts import PromptChange, PromptSchedule
from ..run.sample import embed_prompts, load_prompt_embeds, over_trained
from ..run.source import shortest
from ..run.source_video import SourceVideo, open_source
from ..run.start import LATENTS, read_start
from ..run.video import MAX_GIF_FPS, STDOUT, check_suffix
from .execution import Execution
from .experts import read_model_config
from .fits import warn_of_bfloat16
from .job import Job


@dataclass(frozen=True)
class Request(Execution):
    """Options of a generation that are not keys of GenerateConfig.

    `prompts` are texts, one video each. Alternatively, `prompt_embeds` is a file with the embeddings of one
    prompt; `negative_embeds` is that of the negative prompt, by default `negative.safetensors` beside it.
    `changes` are later prompts with their times. `image` conditions an image-to-video model. `components` is a
    folder or Hub ID of a pipeline with VAE and encoders. `seconds` sets the length instead of `num_frames`; an
    `endless` video ends with Ctrl-C. `size` is height and width in pixels. An image and a start are encoded in float32.
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


def generate_video(
    folder: Path, out: Path, request: Request, settings: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    """Roll out the model in `folder`, or its experts, for each prompt and write the videos to `out`.

    `settings` has keys of GenerateConfig; missing keys default to those of the recipe that made the model, if it
    is known. A `.safetensors` file gets the latents `[C, F, H, W]` under `latents`; any other `out` gets the
    decoded video. Several prompts write `NAME-00`, `NAME-01` and so on, with seeds counting up from `seed`. One
    large model is in memory at a time: first the text encoder, then the transformer with its VAE.

    An interrupt ends the videos where they are: their files are finished, and `interrupted` in the result is
    True. `frames` counts latent frames, which are those of the video if `pixels` is True. Raises
    KeyboardInterrupt if it comes before the first frame, UserError in one line.
    """
    validate(GenerateConfig, dict(settings))
    task = _Task(folder, out, request, settings)
    if Launch.current is not None:
        check_group(Launch.current.group, task.model["num_attention_heads"])
    embeds, schedule, negative = task.texts()
    tokens = task.image_tokens()
    vae = task.vae()
    start = task.start(vae)
    conditions = task.conditions(vae, tokens)
    request.cast(vae)
    config, count = task.config, len(embeds)
    video = task.source if isinstance(task.source, SourceVideo) else None
    job = Job(
        folder=folder,
        execution=Execution(
            dtype=request.dtype, vae_dtype=request.vae_dtype, offload=request.offload, streaming=request.streaming
        ),
        streaming=task.streaming,
        config=config,
        embeds=embeds,
        start=start,
        source=task.source if isinstance(task.source, Tensor) else None,
        video=video is not None,
        conditions=conditions,
        negative=negative,
        endless=request.endless,
    )
    if Launch.current is not None:
        Launch.current.say(job)
    models, chosen = job.models(vae, task.device)
    decoder, encoder = vae if task.pictures else None, None
    if video is not None and not task.pixels:
        video.encode_with(vae)
        encoder = vae
    reserve(models, decoder, task.height, task.width, count, task.device, encoder)
    chunks = job.chunks(models, task.device, schedule, video, lambda done, total: report("generate", done, total))
    started = time.monotonic()
    paths = [out] if count == 1 else [out.with_name(f"{out.stem}-{index:02d}{out.suffix}") for index in range(count)]
    write = _write_latents if out.suffix == LATENTS else functools.partial(_write_videos, vae=vae, fps=config.fps)
    with contextlib.nullcontext() if video is None else contextlib.closing(video):
        frames, interrupted = write(chunks, paths)
    seconds = time.monotonic() - started
    return {
        "path": str(out),
        "paths": [str(path) for path in paths],
        "frames": frames,
        "pixels": task.pixels,
        "seconds": round(seconds, 3),
        "frames_per_second": frames / seconds,
        "interrupted": interrupted,
        "cache": format_bits(task.streaming.cache),
        "kernels": [kernels.report() for kernels in chosen],
    }


class _Task:
    """A request for the model in `folder`, checked before anything large is loaded."""

    def __init__(self, folder: Path, out: Path, request: Request, settings: Mapping[str, Any]) -> None:
        self.request, self.out, self.settings = request, out, settings
        self.root, self.model = read_model_config(folder)
        self.device = default_device()
        warn_of_bfloat16(self.root, request.dtype, self.device)
        self.digits = prompt_encoder(self.model) == DIGITS
        self.temporal, self.spatial, _ = latent_scale(self.model)
        self.pixels = self.spatial == 1
        self.pictures = out.suffix != LATENTS
        check_image(self.model, request.image, "--image", "--start")
        self.image = None if request.image is None else read_image(request.image)
        self._check_out()
        reads_text = request.prompts or request.changes or "negative_prompt" in settings
        if request.components is not None and self.pixels and (self.digits or not reads_text):
            raise UsageError("this model makes pixels and reads no VAE or text encoder; leave --components out")
        self.streaming = request.streaming_of(self.root)
        keys = over_trained(settings, recorded_section(self.root, "generate"), self.digits)
        if request.size is not None:
            keys["latent_height"] = to_latent("height", request.size[0], self.spatial)
            keys["latent_width"] = to_latent("width", request.size[1], self.spatial)
        if request.seconds is not None:
            fps = validate(GenerateConfig, keys).fps
            keys["num_frames"] = latent_frames(video_frames(request.seconds, fps), self.temporal)
        self.config = validate(GenerateConfig, keys)
        if out.suffix.lower() == GIF and self.config.fps > MAX_GIF_FPS:
            raise UsageError(
                f"a .gif plays at most {MAX_GIF_FPS} frames per second, not {self.config.fps}; give a lower --fps or "
                "write .mp4"
            )
        self.height, self.width = latent_size(self.model, self.config)
        check_latent_size(self.model, self.height, self.width, self.spatial)
        self.source = self._source()
        # None if the length is not known in advance.
        self.frames = None if request.endless else shortest(self.config.num_frames, self.source)
        if self.frames is not None:
            check_length(self.model, self.frames)
            self._check_changes(self.frames)
            self._check_fits(self.frames)

    def _source(self) -> Tensor | SourceVideo | None:
        """The source to restyle: latents `[1, C, F, H, W]`, or a video that is not encoded yet."""
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
            raise UsageError("stdout takes one video; give one prompt, or write a file")
        if request.endless and out.suffix.lower() in KEPT_WHOLE:
            raise UsageError(f"a {out.suffix} file is kept in memory until its end; write .mp4, a folder or -")

    def _check_fits(self, frames: int) -> None:
        latents = (noise_channels(self.model), frames, self.height, self.width)
        pixels = (first_video_frame(frames, self.temporal), self.height * self.spatial, self.width * self.spatial)
        check_fits(self.out, max(1, len(self.request.prompts)), latents, pixels, "write .mp4, a folder or -")

    def texts(self) -> tuple[Tensor, PromptSchedule | None, Tensor | None]:
        """Embeddings `[B, L, D]` of the prompts, and the later prompts and the negative prompt `[1, L, D]`, if any."""
        request, config = self.request, self.config
        prompts = [*request.prompts, *(change.prompt for change in request.changes)]
        stored = self._negative_file()
        negative = [] if stored is not None or config.guidance_scale == 1 else [config.negative_prompt or ""]
        if self.digits or not prompts:
            # The empty prompt of digits models is zeros, which is also the rollout's default.
            negative = [text for text in negative if text]
        if config.guidance_scale != 1 and stored is None and not negative and not self.digits:
            raise UsageError("guidance needs a negative prompt; give --negative-embeds or --guidance-scale 1")
        embedded = self._embed([*prompts, *negative])
        count = len(request.prompts)
        if request.prompt_embeds is not None:
            # A copy, because what is sent to other processes is the whole memory of a view.
            first = load_prompt_embeds(request.prompt_embeds, self.model["text_dim"])[:1].clone()
        else:
            first = torch.stack(embedded[:count])
        later = [text.unsqueeze(0) for text in embedded[count : len(prompts)]]
        times = [change.seconds for change in request.changes]
        schedule = PromptSchedule(list(zip(times, later, strict=True)), config.fps, self.temporal) if later else None
        if stored is not None:
            return first, schedule, read_negative(stored, first.shape[1:]).unsqueeze(0)
        return first, schedule, embedded[-1].unsqueeze(0) if negative else None

    def _negative_file(self) -> Path | None:
        """File with the embedding of the negative prompt; None if it has to be encoded or guidance is off."""
        embeds, negative = self.request.prompt_embeds, self.request.negative_embeds
        if negative is not None or embeds is None:
            return negative
        if "negative_prompt" in self.settings or self.config.guidance_scale == 1:
            return None
        return find_negative(embeds)

    def _embed(self, prompts: Sequence[str]) -> list[Tensor]:
        if not prompts:
            return []
        if self.digits:
            return list(embed_prompts(prompts))
        parts = find_parts(self.root, TEXT, self.request.components)
        if parts is None:
            raise UsageError(
                "this checkpoint has no text encoder; give --components, a folder or Hub ID of its pipeline, "
                "or --prompt-embeds and --negative-embeds, .safetensors files"
            )
        with text_encoder(parts, torch.bfloat16, self.device) as embed:
            embeds = [embed([prompt])[0].float() for prompt in prompts]
        check_text_width(embeds[0].shape[1], self.model, parts)
        return embeds

    def vae(self) -> Any:
        """The VAE, on the CPU; None if nothing has to be encoded or decoded."""
        start = self.config.start
        encodes = self.image is not None or (start is not None and Path(start).suffix != LATENTS)
        encodes = encodes or isinstance(self.source, SourceVideo)
        if self.pixels or not (self.pictures or encodes):
            return None
        parts = find_parts(self.root, PICTURES, self.request.components)
        encoded = "image" if self.image is not None else "source" if isinstance(self.source, SourceVideo) else None
        if parts is None and encoded is not None:
            raise UsageError(
                f"this checkpoint has no VAE to encode the {encoded}; give --components, a folder or Hub ID of "
                "its pipeline"
            )
        if parts is None:
            raise UsageError(
                "the model makes latents and this checkpoint has no VAE; give --components, a folder or Hub ID of "
                f"its pipeline, or write {self.out.with_suffix(LATENTS).name if self.out != STDOUT else LATENTS}"
            )
        vae = load_vae(parts)
        check_vae(vae, self.model, f"the VAE in {parts}", "give --components")
        return vae

    def start(self, vae: Any) -> Tensor | None:
        """Clean latents `[1, C, F0, H, W]` that the video starts from, or None."""
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
        """The image's CLIP tokens `[1, 257, D]`; None if the model does not read any."""
        if self.image is None or not reads_tokens(self.model):
            return None
        parts = find_parts(self.root, IMAGE_PARTS, self.request.components)
        if parts is None:
            raise UsageError(
                "this checkpoint has no image encoder, which the model needs; give --components, a folder or "
                "Hub ID of its pipeline"
            )
        with image_encoder(parts, self.device) as embed:
            return embed(self.image)

    def conditions(self, vae: Any, tokens: Tensor | None) -> dict[str, Any] | None:
        """The image conditioning of the model by name; None without an image."""
        if self.image is None:
            return None
        vae.to(self.device)
        conditions = image_conditions(self.model, self.image, vae, self.height, self.width, self.frames, tokens)
        vae.to("cpu")
        return conditions


def _write_latents(chunks: Iterable[Tensor], paths: Sequence[Path]) -> tuple[int, bool]:
    """Write one latents file per video; returns the number of latent frames, and whether an interrupt ended them."""
    finished: list[Tensor] = []
    interrupted = False
    try:
        finished.extend(chunk.cpu() for chunk in chunks)
    except KeyboardInterrupt:
        if not finished:
            raise
        interrupted = True
    videos = torch.cat(finished, dim=2)
    for path, latents in zip(paths, videos, strict=True):
        with atomic_file(path) as temporary:
            save_tensors({"latents": latents.contiguous()}, temporary)
    return videos.shape[2], interrupted


def _write_videos(chunks: Iterable[Tensor], paths: Sequence[Path], vae: Any, fps: float) -> tuple[int, bool]:
    """Decode and write each video in its own thread; returns the same as `_write_latents`."""
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
    """Iterates over the chunks of a rollout and counts the latent frames handed out so far."""

    def __init__(self, chunks: Iterable[Tensor]) -> None:
        self.chunks, self.frames = chunks, 0

    def __iter__(self) -> Any:
        for chunk in self.chunks:
            self.frames += chunk.shape[2]
            yield chunk
