"""A model in place of the generator in Self-Forcing's inference code makes the same videos as our code."""

from __future__ import annotations

from typing import Any

import pico
import pytest
import torch
from stream_case import FLOAT32
from torch import Tensor, nn

from mla_convert import SelfForcingGenerator
from mla_convert.run.stream import stream_chunks

FRAMES, CHUNK, HEIGHT, WIDTH, SHIFT = 12, 2, 6, 4, 5.0
TOKENS = HEIGHT * WIDTH // 4
STEPS = [1000, 750, 500, 250]
CAUSAL = {"num_frames_per_block": CHUNK, "window_frames": 6, "sink_frames": 2}
LAYOUT = {"position": "rotate_on_read", "kv_lora_rank": 20, "own_chunk": "exact"}


class Pipeline(nn.Module):
    """The loop of Self-Forcing's `CausalInferencePipeline`, with its calls, shapes and caches."""

    def __init__(self, generator: Any, chunk: int = CHUNK) -> None:
        super().__init__()
        self.generator, self.scheduler = generator, generator.get_scheduler()
        self.kv_cache1: Any = None
        # Theirs, whatever the model has.
        self.num_transformer_blocks, self.frame_seq_length = 30, TOKENS
        self.local_attn_size = generator.model.local_attn_size
        # Warped as their configurations say.
        timesteps = torch.cat([self.scheduler.timesteps, torch.zeros(1)])
        self.denoising_step_list = timesteps[1000 - torch.tensor(STEPS)]
        generator.model.num_frame_per_block = chunk

    def _initialize_kv_cache(self, batch_size: int, dtype: torch.dtype, device: Any) -> None:
        raise AssertionError("dense caches are allocated")

    _initialize_crossattn_cache = _initialize_kv_cache

    def inference(self, noise: Tensor, text: Tensor, renoise: list[Tensor], initial: Tensor | None = None) -> Tensor:
        if self.kv_cache1 is None:
            self._initialize_kv_cache(batch_size=len(noise), dtype=noise.dtype, device=noise.device)
            self._initialize_crossattn_cache(batch_size=len(noise), dtype=noise.dtype, device=noise.device)
        else:
            for block in range(self.num_transformer_blocks):
                self.crossattn_cache[block]["is_init"] = False
            for block in self.kv_cache1:
                block["global_end_index"] = torch.tensor([0])
                block["local_end_index"] = torch.tensor([0])
        drawn, made = iter(renoise), []
        given = 0 if initial is None else initial.shape[1]
        for start in range(0, given, CHUNK):
            assert initial is not None
            made.append(initial[:, start : start + CHUNK])
            self._call(made[-1], text, torch.zeros(len(noise), 1, dtype=torch.int64), start)
        for start in range(given, given + noise.shape[1], CHUNK):
            x = noise[:, start - given : start - given + CHUNK]
            for index, t in enumerate(self.denoising_step_list):
                timestep = torch.ones(x.shape[:2], dtype=torch.int64) * t
                _, clean = self._call(x, text, timestep, start)
                if index + 1 < len(STEPS):
                    following = self.denoising_step_list[index + 1] * torch.ones(x.shape[0] * x.shape[1])
                    noisy = self.scheduler.add_noise(clean.flatten(0, 1), next(drawn).flatten(0, 1), following)
                    x = noisy.unflatten(0, clean.shape[:2])
            made.append(clean)
            self._call(clean, text, torch.zeros_like(timestep), start)
        return torch.cat(made, dim=1)

    def _call(self, x: Tensor, text: Tensor, timestep: Tensor, start: int) -> Any:
        return self.generator(
            noisy_image_or_video=x,
            conditional_dict={"prompt_embeds": text},
            timestep=timestep,
            kv_cache=self.kv_cache1,
            crossattn_cache=self.crossattn_cache,
            current_start=start * self.frame_seq_length,
        )


def model_of(layout: dict[str, Any] | None, **causal: Any) -> Any:
    dense = pico.dense_model(causal=CAUSAL | causal)
    return dense if layout is None else pico.convert(dense, **layout)


def drawn(seed: int, batch: int, chunks: int) -> tuple[Tensor, list[Tensor]]:
    """The noise of a rollout in the order of `stream_chunks`: for chunks, `[B, F, C, H, W]`, and for steps."""
    generator = torch.Generator().manual_seed(seed)
    own, more = [], []
    for _ in range(chunks):
        noises = [torch.randn(batch, 2, CHUNK, HEIGHT, WIDTH, generator=generator) for _ in STEPS]
        own.append(noises[0])
        more += noises[1:]
    return torch.cat(own, dim=2).transpose(1, 2), [noise.transpose(1, 2) for noise in more]


def attached(model: Any, **settings: Any) -> Pipeline:
    generator = SelfForcingGenerator(model, timestep_shift=SHIFT, **settings)
    pipeline = Pipeline(generator)
    generator.attach(pipeline)
    return pipeline


def expected(model: Any, text: Tensor, frames: int, seed: int, start: Tensor | None = None) -> Tensor:
    settings: dict[str, Any] = {"shift": SHIFT, "sampler": "renoise", "denoising_steps": STEPS}
    chunks = stream_chunks(model, text, frames, HEIGHT, WIDTH, seed=seed, start=start, **settings)
    return torch.cat(list(chunks), dim=2).transpose(1, 2)


@pytest.mark.parametrize("layout", [None, LAYOUT, LAYOUT | {"own_chunk": "latent"}])
@pytest.mark.parametrize("positions", ["window", "absolute"])
def test_their_loop_makes_our_video(layout: dict[str, Any] | None, positions: str) -> None:
    """Two videos in succession, twice as long as the window; observed 1.8e-7."""
    model = model_of(layout, sink_positions=positions)
    pipeline = attached(model)
    for seed in (7, 8):
        text = pico.inputs(2, 2, HEIGHT, WIDTH, seed)[2]
        noise, renoise = drawn(seed, 2, FRAMES // CHUNK)
        made = pipeline.inference(noise, text, renoise)
        assert pico.relative_error(made, expected(model, text, FRAMES, seed)) < FLOAT32
    assert len(pipeline.kv_cache1) == 30 and not any(
        torch.is_tensor(x) and x.numel() > 1 for b in pipeline.kv_cache1 for x in b.values()
    )
    # Pipelines of demonstrations allocate anew for every video.
    pipeline._initialize_kv_cache(2, torch.float32, "cpu")
    pipeline.inference(noise, text, renoise)
    assert len(pipeline.generator._streams) == 1


def test_a_given_beginning_and_another_size() -> None:
    model = model_of(LAYOUT)
    pipeline = attached(model)
    text = pico.inputs(1, 2, HEIGHT, WIDTH)[2]
    noise, renoise = drawn(3, 1, 3)
    start = torch.randn(1, 2, CHUNK, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))
    made = pipeline.inference(noise[:, CHUNK:], text, renoise[3:], initial=start.transpose(1, 2))
    assert pico.relative_error(made, expected(model, text, 3 * CHUNK, 3, start)) < FLOAT32
    # Twice as many items take caches of their own.
    twice, again = noise.repeat(2, 1, 1, 1, 1), [each.repeat(2, 1, 1, 1, 1) for each in renoise]
    one, two = pipeline.inference(twice, text.repeat(2, 1, 1), again)
    # Observed: 8e-8.
    assert pico.relative_error(one, two) < FLOAT32


def test_two_caches_are_two_streams() -> None:
    """Classifier-free guidance calls the generator in turn with a cache for each prompt."""
    model = model_of(LAYOUT)
    generator = SelfForcingGenerator(model)
    texts, caches = pico.inputs(2, 2, HEIGHT, WIDTH)[2].split(1), ([], [])
    x, seen = torch.randn(1, 2 * CHUNK, 2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)), [[], []]
    for start in (0, CHUNK):
        for text, kept, found in zip(texts, caches, seen, strict=True):
            call = {"conditional_dict": {"prompt_embeds": text}, "kv_cache": kept, "current_start": start * TOKENS}
            chunk = x[:, start : start + CHUNK]
            found.append(generator(chunk, timestep=torch.full((1, CHUNK), 500), **call)[0])
            generator(chunk, timestep=torch.zeros(1, CHUNK), **call)
    for text, found in zip(texts, seen, strict=True):
        cache = model.init_cache(1, HEIGHT, WIDTH)
        for start, v in zip((0, CHUNK), found, strict=True):
            chunk = x[:, start : start + CHUNK].transpose(1, 2)
            wanted = model.forward_chunk(chunk, torch.full((1,), 500.0), text, cache)
            model.forward_chunk(chunk, torch.zeros(1), text, cache, write=True)
            # Observed: 0.
            assert pico.relative_error(v.transpose(1, 2), wanted) < FLOAT32


def test_casting_leaves_the_data_types_and_moving_moves() -> None:
    pipeline = attached(model_of(LAYOUT)).to(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in pipeline.generator.parameters()} == {torch.float32}
    noise, renoise = drawn(1, 1, 1)
    text = pico.inputs(1, 2, HEIGHT, WIDTH)[2]
    made = pipeline.inference(noise.bfloat16(), text.bfloat16(), [each.bfloat16() for each in renoise])
    assert made.dtype == torch.bfloat16
    assert pipeline.to("meta").generator.transformer.device.type == "meta"


def test_what_it_refuses() -> None:
    model = model_of(LAYOUT)
    generator = SelfForcingGenerator(model, context_timestep=10.0)
    text = {"prompt_embeds": pico.inputs(1, 2, HEIGHT, WIDTH)[2]}
    x, clean = torch.zeros(1, CHUNK, 2, HEIGHT, WIDTH), torch.zeros(1, CHUNK)
    with pytest.raises(ValueError, match="this generator needs a kv_cache"):
        generator(x, text, clean)
    with pytest.raises(ValueError, match="a multiple of the 6 tokens per frame; set the pipeline's frame_seq_length"):
        generator(x, text, clean, kv_cache=[], current_start=7)
    caches: list[Any] = []
    generator(x, text, clean + 11, kv_cache=caches)
    with pytest.raises(ValueError, match="at frame 2 follows one that was not cached, at frame 0; set"):
        generator(x, text, clean, kv_cache=caches, current_start=CHUNK * TOKENS)
    with pytest.raises(ValueError, match="got a chunk of 1 frames at frame 0, where the model expects 2"):
        generator(x[:, :1], text, clean[:, :1], kv_cache=caches)
    with pytest.raises(ValueError, match="the pipeline makes chunks of 3 frames, the model of 2"):
        Pipeline(generator, chunk=3)
    assert generator.model.local_attn_size == 6
