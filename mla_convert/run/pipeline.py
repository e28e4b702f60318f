"""Defines `StreamingMLAPipeline`, a diffusers pipeline for a converted or dense causal model.

Importing this module makes the class an attribute of `diffusers`, where a checkpoint's model_index.json looks for it;
`from mla_convert import StreamingMLAPipeline` imports it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import WanLoraLoaderMixin
from PIL import Image
from torch import Tensor

from ..denoise import Schedule
from ..distill.encode.models import TEXT_TOKENS, encode_image, encode_text
from ..errors import UsageError
from ..families.image import reads_tokens
from ..flow import Sampler
from ..zoo.digits.data import FRAME
from .arguments import check_arguments, frames_asked, sampling_settings
from .calls import Calls
from .config import DEFAULT_LATENT_FRAMES
from .decode import StreamingDecoder
from .decode_memory import reserve
from .extent import video_end
from .image import check_image, image_conditions, read_image
from .latents import (
    DIGITS,
    check_latent_size,
    check_vae,
    latent_scale,
    prompt_encoder,
    to_latent,
)
from .loading import load_arguments
from .output import Frames, OutputType, StreamingPipelineOutput, handed_out, joined, to_output
from .prefetch import prefetch
from .prompts import PromptSchedule, checked_embeds
from .sample import embed_prompts
from .source import shortest
from .source_video import SourceVideo, open_source
from .start import read_start
from .stream import stream_chunks
from .streaming import StreamingConfig
from .turns import Call, Closed, Turns, turns_of

Start = Tensor | str | Path | Image.Image | Sequence[Image.Image]
Source = Tensor | str | Path | Iterable[Image.Image]


class StreamingMLAPipeline(WanLoraLoaderMixin, DiffusionPipeline):
    """Generates video of any length, chunk by chunk, with a transformer that has `forward_chunk`.

    `transformer` is a model of this package. `vae` (`AutoencoderKLWan`) decodes its latents, if any. `text_encoder`
    (UMT5) and `tokenizer` encode prompts, unless `prompt_format` is `digits`. `image_encoder` (CLIP) and
    `image_processor` encode an image for a model that reads its tokens. `scheduler` is kept but not used: `sampler`
    denoises chunks. `sampling` holds keys of a recipe's `generate` section that the model was trained for, the defaults
    of a call. `streaming` holds keys of the section of that name, for a transformer without `set_kernels`.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "scheduler", "image_encoder", "image_processor"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: Any,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        scheduler: Any = None,
        prompt_format: str | None = None,
        sampling: dict[str, Any] | None = None,
        streaming: dict[str, Any] | None = None,
        image_encoder: Any = None,
        image_processor: Any = None,
    ) -> None:
        super().__init__()
        if not hasattr(transformer, "forward_chunk"):
            raise ValueError(f"{type(transformer).__name__} does not stream; load it with mla_convert's class for it")
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            image_encoder=image_encoder,
            image_processor=image_processor,
        )
        self.register_to_config(prompt_format=prompt_format, sampling=sampling, streaming=streaming)
        if transformer.kernels is None:
            # An earlier choice of `set_cache` stays unless another is recorded.
            StreamingConfig(**{"cache": transformer.cache_bits, **(streaming or {})}).apply(transformer)
        self._calls = Calls()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load an export, checkpoint, run or transformer folder, or a repository on the Hub.

        Arguments are those of diffusers. Without `dtype`, the transformer keeps its stored dtype, the VAE gets float32
        and the text encoder bfloat16. `dtype={"vae": torch.bfloat16}` halves the memory of decoding. Components that
        the checkpoint only references are loaded from the referenced place; pass None to skip one. Raises UserError in
        one line.
        """
        folder, arguments = load_arguments(pretrained_model_name_or_path, kwargs)
        return cls(**arguments) if folder is None else super().from_pretrained(folder, **arguments)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """A pipeline with the components and settings of another, except those in `kwargs`; weights are shared."""
        if getattr(pipeline, "transformer_2", None) is not None:
            raise UsageError(f"{cls.__name__} has one transformer, not {type(pipeline).__name__}'s two")
        names = inspect.signature(cls.__init__).parameters
        if unknown := sorted(kwargs.keys() - names):
            raise UsageError(f"from_pipe takes no {unknown[0]}: weights are shared; use .to(...) on the result instead")
        held = {**pipeline.config, **pipeline.components}
        return cls(**{name: value for name, value in held.items() if name in names} | kwargs)

    @property
    def digits(self) -> bool:
        """Whether prompts are those of the embedded digits model, which needs no text encoder."""
        return bool((self.config.prompt_format or prompt_encoder(self.transformer.config)) == DIGITS)

    @property
    def pixels(self) -> bool:
        """Whether the transformer generates pixels instead of latents."""
        return self.vae_scale == (1, 1)

    @property
    def vae_scale(self) -> tuple[int, int]:
        """Video frames per latent frame after the first, and pixels per latent pixel in height and width."""
        return latent_scale(self.transformer.config)[:2]

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the last call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Denoising steps per chunk in the last call."""
        return self._num_timesteps

    @property
    def _turns(self) -> Turns:
        return turns_of(self.transformer)

    @property
    def interrupt(self) -> bool:
        """Set this in a callback to end its video with the current chunk; elsewhere it ends all that have not ended."""
        return any(call.interrupt for call in self._calls.addressed())

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        for call in self._calls.addressed():
            call.interrupt = value

    # The name that callbacks for other pipelines of diffusers set.
    _interrupt = interrupt

    def encode_prompt(self, prompt: str | Sequence[str], max_sequence_length: int = TEXT_TOKENS) -> Tensor:
        """Embeddings `[B, L, D]`, computed as in `WanPipeline`. Raises UsageError without a text encoder."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if self.digits:
            return embed_prompts(prompts)
        if self.text_encoder is None or self.tokenizer is None:
            raise UsageError(
                "this pipeline has no text encoder and tokenizer; pass both, or prompt_embeds and, with guidance, "
                "negative_prompt_embeds"
            )
        with self._turns.turn():
            return encode_text(self.tokenizer, self.text_encoder, prompts, self._execution_device, max_sequence_length)

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_frames: int | None = None,
        seconds: float | None = None,
        height: int | None = None,
        width: int | None = None,
        prompt_schedule: Mapping[float, str] | Sequence[tuple[float, str]] = (),
        negative_prompt: str | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        start: Start | None = None,
        source: Source | None = None,
        strength: float | None = None,
        image: str | Path | Image.Image | None = None,
        last_image: None = None,
        num_inference_steps: int | None = None,
        denoising_steps: Sequence[int] | None = None,
        first_chunk_steps: Sequence[int] | None = None,
        sampler: Sampler | None = None,
        shift: float | None = None,
        guidance_scale: float | None = None,
        context_noise: float | None = None,
        recache: bool | None = None,
        hold_start: bool | None = None,
        fps: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        num_videos_per_prompt: int = 1,
        output_type: OutputType = "np",
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = TEXT_TOKENS,
        ahead: int = 1,
    ) -> Iterator[Frames]:
        """Yield chunks of frames, in the form of `StreamingPipelineOutput.frames`, computed ahead in a thread.

        Without `num_frames` or `seconds`, the video never ends, or with absolute positions ends with the rotary table.
        Lengths and sizes are in frames and pixels of the video; lengths are rounded up to whole latent frames.
        `prompt_schedule` maps seconds to prompts. A prompt applies to every item from the next chunk boundary on; with
        `recache`, the cached window is then computed again. `start` is a clean beginning: latents `[C, F, h, w]`,
        pictures or a file of either. With `hold_start` it may end inside a chunk. `source` is a video to restyle, and
        the video ends with it: latents `[C, F, h, w]`, a file, or an iterable of pictures, such as a camera, which is
        read only as far as chunks need. Each chunk starts as the source with noise at level `strength` in (0, 1], by
        default 0.5. `image` conditions every item of a model with channels for it; `last_image` is refused. With one
        `generator`, or `seed` instead, per item of a batch, each item equals its video alone. The default is seed 0.
        The items of a prompt are `num_videos_per_prompt`, one after another. A thread computes `ahead` chunks in
        advance and calls `callback_on_step_end(pipe, step, timestep, {"latents": ...})`; with 0, or where processes
        share chunks, there is no thread. Defaults are those that the model was trained for. Streams in different
        threads take turns, chunk by chunk. Closing the iterator ends its stream only. Raises UserError in one line.
        """
        requested = {
            "num_inference_steps": num_inference_steps,
            "denoising_steps": denoising_steps,
            "first_chunk_steps": first_chunk_steps,
            "sampler": sampler,
            "shift": shift,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "context_noise": context_noise,
            "strength": strength,
            "recache": recache,
            "hold_start": hold_start,
            "fps": fps,
        }
        check_arguments(
            output_type=output_type,
            prompt=prompt,
            prompt_embeds=prompt_embeds,
            seed=seed,
            generator=generator,
            last_image=last_image,
            num_videos_per_prompt=num_videos_per_prompt,
        )
        config = sampling_settings(requested, self.config.sampling or {}, self.digits, source, start)
        # The file of a standalone checkpoint may be older. Threads would be at different steps when all leave a stream.
        shared = getattr(self.transformer, "parallel", None) is not None
        if shared and self._calls.running:
            raise UsageError("processes that share chunks stream one video at a time; finish or close the other one")
        if not self.pixels and self.vae is None and output_type != "latent":
            raise UsageError("this pipeline has no vae to decode latents; pass one, or output_type='latent'")
        if not self.pixels and self.vae is not None:
            check_vae(self.vae, self.transformer.config, "the pipeline's vae", "pass the model's own")
        check_image(self.transformer.config, image, "image=", "start=")
        size = self._latent_size(height, width)
        given = self._source(source, size, config["fps"])
        frames = shortest(frames_asked(num_frames, seconds, config["fps"], self.vae_scale[0]), given)
        video_end(self.transformer.causal, self.transformer.rotary_table().max_len, frames)
        embeds: Any = prompt_embeds if prompt is None else self.encode_prompt(prompt, max_sequence_length)
        texts = checked_embeds("prompt_embeds", embeds, self.transformer.config.text_dim)
        changes = sorted(prompt_schedule.items() if isinstance(prompt_schedule, Mapping) else prompt_schedule)
        embedded = [(at, self.encode_prompt(text, max_sequence_length)) for at, text in changes]
        self._guidance_scale = config["guidance_scale"]
        schedule = Schedule.of(
            config["num_inference_steps"],
            config["shift"],
            config["denoising_steps"],
            config["first_chunk_steps"],
            strength=1.0 if source is None else config["strength"],
        )
        self._num_timesteps = len(schedule.times) - 1
        guides, away = config["guidance_scale"] != 1, config.pop("negative_prompt")
        negative = negative_prompt_embeds if guides else None
        if negative is None and guides and (away or self._reads_empty_prompts()):
            negative = self.encode_prompt(away or "", max_sequence_length)
        if negative is None and guides and not self.digits:
            raise UsageError("guidance needs a negative prompt; pass negative_prompt_embeds, or guidance_scale=1")
        if negative is not None:
            negative = checked_embeds("negative_prompt_embeds", negative, self.transformer.config.text_dim, texts)
            negative = negative.repeat_interleave(num_videos_per_prompt if len(negative) > 1 else 1, dim=0)
        texts = texts.repeat_interleave(num_videos_per_prompt, dim=0)
        settings = {
            **{key: value for key, value in config.items() if key != "fps"},
            "seed": (0 if seed is None else seed) if generator is None else generator,
            "negative_hidden_states": negative,
            "start": self._start(start, size),
            "source": given,
            "conditions": self._conditions(image, frames, size),
            "prompt_at": PromptSchedule(embedded, config["fps"], self.vae_scale[0]) if embedded else None,
            "device": self._execution_device,
        }
        callback = None
        if callback_on_step_end is not None:
            names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
            unknown = [name for name in names if name not in self._callback_tensor_inputs]
            if unknown:
                raise UsageError(f"callbacks get {', '.join(self._callback_tensor_inputs)}, not {', '.join(unknown)}")
            callback = callback_on_step_end
        call = self._calls.begin(self._turns)
        made = self._chunks(call, schedule, texts, frames, size, settings, output_type, callback)
        return handed_out(prefetch(made, 0 if shared else ahead, call.closed), output_type)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_frames: int | None = None,
        seconds: float | None = None,
        output_type: OutputType = "np",
        return_dict: bool = True,
        **settings: Any,
    ) -> StreamingPipelineOutput | tuple[Frames]:
        """Generate a whole video with the arguments of `stream`; by default 21 latent frames, or all of its source."""
        if num_frames is None and seconds is None and settings.get("source") is None:
            num_frames = 1 + (DEFAULT_LATENT_FRAMES - 1) * self.vae_scale[0]
        chunks = list(
            self.stream(
                prompt, num_frames=num_frames, seconds=seconds, output_type=output_type, **{"ahead": 0, **settings}
            )
        )
        frames = joined(chunks, output_type)
        return StreamingPipelineOutput(frames=frames) if return_dict else (frames,)

    def _chunks(
        self,
        call: Call,
        schedule: Schedule,
        texts: Tensor,
        num_frames: int | None,
        size: tuple[int, int],
        settings: dict[str, Any],
        output_type: OutputType,
        callback: Callable[..., Any] | None,
    ) -> Iterator[Tensor]:
        start = settings["start"]
        given = 0 if start is None else start.shape[2]
        total = None
        if num_frames is not None:
            ranges = self.transformer.causal.chunk_ranges(num_frames)
            total = sum(len(schedule.of_chunk(first)) - 1 for first, stop in ranges if stop > given)
        decodes = not self.pixels and output_type != "latent"
        decoder = StreamingDecoder(self.vae) if decodes else None
        source = settings["source"]
        encodes = self.vae if isinstance(source, SourceVideo) and not self.pixels else None
        reserve([self.transformer], self.vae if decodes else None, *size, len(texts), settings["device"], encodes)
        done = 0
        try:
            with self.progress_bar(itertools.count() if total is None else None, total) as bar:

                def on_step(first: int, index: int, t: float, x: Tensor) -> Tensor | None:
                    nonlocal done
                    bar.update()
                    done += 1
                    if call.closed.is_set():
                        raise Closed
                    if callback is None:
                        return None
                    with call.callback():
                        changed = callback(self, done - 1, torch.tensor(1000 * t), {"latents": x})
                    return None if changed is None else changed.get("latents")

                chunks = stream_chunks(self.transformer, texts, num_frames, *size, on_step=on_step, **settings)
                while not call.interrupt:
                    with call.turns.turn(call):
                        chunk = next(chunks, None)
                        if chunk is None:
                            return
                        finished = self._finished(chunk, decoder, output_type)
                    yield finished
        except Closed:
            return
        finally:
            if isinstance(source, SourceVideo):
                source.close()
            self._calls.end(call)
            # A call that computes meanwhile frees them at its end.
            call.turns.when_idle(self.maybe_free_model_hooks)

    def _finished(self, chunk: Tensor, decoder: StreamingDecoder | None, output_type: OutputType) -> Tensor:
        """A chunk `[B, C, F, h, w]` in the form that `handed_out` takes."""
        if output_type == "latent":
            return chunk
        pixels = chunk if decoder is None else decoder(chunk)
        if decoder is not None:
            self._send_back_vae()
        return to_output(pixels, output_type)

    def _send_back_vae(self) -> None:
        """Offload the VAE: model offloading moves a component back only when the next one is called, and it is last."""
        for hook in getattr(self, "_all_hooks", []):
            if hook.model is self.vae:
                hook.offload()

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        spatial = self.vae_scale[1]
        recorded = self.config.sampling or {}
        default = (FRAME, FRAME) if self.digits else latent_scale(self.transformer.config).size
        rows = recorded.get("latent_height") or default[0] if height is None else to_latent("height", height, spatial)
        columns = recorded.get("latent_width") or default[1] if width is None else to_latent("width", width, spatial)
        check_latent_size(self.transformer.config, rows, columns, spatial)
        return rows, columns

    def _reads_empty_prompts(self) -> bool:
        return not self.digits and self.text_encoder is not None and self.tokenizer is not None

    def _start(self, start: Start | None, size: tuple[int, int]) -> Tensor | None:
        if start is None or isinstance(start, Tensor):
            return start.unsqueeze(0) if isinstance(start, Tensor) and start.ndim == 4 else start
        pictures = [start] if isinstance(start, Image.Image) else start
        source = Path(pictures) if isinstance(pictures, str) else pictures
        device = self._execution_device
        with self._turns.turn():
            latents = read_start(source, self.transformer.noise_channels, *size, None if self.pixels else self.vae)
            self._send_back_vae()
        return latents.unsqueeze(0).to(device)

    def _source(self, source: Source | None, size: tuple[int, int], fps: float) -> Tensor | SourceVideo | None:
        if source is None or isinstance(source, Tensor):
            return source.unsqueeze(0) if isinstance(source, Tensor) and source.ndim == 4 else source
        pictures = Path(source) if isinstance(source, str) else source
        if not isinstance(pictures, Path | Image.Image):
            pictures = self._turns.between_turns(pictures)
        shape = (self.transformer.noise_channels, *size)
        opened = open_source([pictures] if isinstance(pictures, Image.Image) else pictures, shape, self.vae_scale, fps)
        if isinstance(opened, SourceVideo) and not self.pixels:
            if self.vae is None:
                raise UsageError("this pipeline has no vae to encode the source; pass one, or give latents")
            opened.encode_with(self.vae, self._send_back_vae)
        return opened

    def _conditions(
        self, image: str | Path | Image.Image | None, frames: int | None, size: tuple[int, int]
    ) -> dict[str, Any] | None:
        if image is None:
            return None
        if self.vae is None:
            raise UsageError("this pipeline has no vae to encode the image; pass one")
        picture, config = read_image(Path(image) if isinstance(image, str) else image), self.transformer.config
        tokens = None
        with self._turns.turn():
            if reads_tokens(config):
                if self.image_encoder is None or self.image_processor is None:
                    raise UsageError("this pipeline has no image_encoder and image_processor for the image; pass both")
                tokens = encode_image(self.image_processor, self.image_encoder, picture)
            conditions = image_conditions(config, picture, self.vae, *size, frames, tokens)
            self._send_back_vae()
        return conditions


diffusers.StreamingMLAPipeline = StreamingMLAPipeline
