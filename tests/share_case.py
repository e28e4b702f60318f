"""One process of several that share the chunks of rollouts: how far each rollout is from that of a process alone."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import torch
import torch.distributed as dist
from torch import Tensor

from mla_convert.errors import UserError
from mla_convert.mla import fused, kernels
from mla_convert.run.batch import StreamBatch
from mla_convert.run.stream import stream_chunks

# 15 tokens per frame in chunks of two frames, the last one of one: 30 or 15 tokens.
HEIGHT, WIDTH, FRAMES = 10, 6, 7
HEADS = 6
ON_GPU = "bfloat16 on a GPU"
EXACT = {"position": "rotate_on_read", "kv_lora_rank": 20}
CACHES = {"int8": "int8", "mixed": ((6, 8), (14, 4))}


def model_of(
    settings: dict[str, Any] | None = None, layers: int = 2, seed: int = 0, heads: int = HEADS, **dense: Any
) -> Any:
    """A dense model, or with `settings` a converted one, whose parameters are all random."""
    model = pico.dense_model(heads=heads, layers=layers, seed=seed, **dense)
    if settings is None:
        return model
    model = pico.convert(model, init="random", key_mean=settings.get("position") != "decoupled", **settings)
    for name, parameter in model.named_parameters():
        if name.endswith(("k_mean", "q_pe_coef")):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def rolled_out(model: Any, batch: int = 1, frames: int = FRAMES, **settings: Any) -> Tensor:
    text = torch.randn(batch, 3, 8, generator=torch.Generator().manual_seed(1))
    size = settings.pop("size", (HEIGHT, WIDTH))
    settings = {"num_inference_steps": 2, "shift": 3.0, "seed": 5, **settings}
    return torch.cat(list(stream_chunks(model, text, frames, *size, **settings)), dim=2)


def batched(model: Any) -> Tensor:
    """Two streams that join one after the other."""
    streams = StreamBatch(model, 3, HEIGHT, WIDTH, num_inference_steps=2)
    text = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    streams.join(text, 1, FRAMES)
    chunks = streams.step()
    streams.join(-text, 2, FRAMES, guidance_scale=2.0)
    chunks += list(streams.chunks())
    return torch.cat([chunk.latents for chunk in sorted(chunks, key=lambda chunk: chunk[:2])], dim=1)


def with_kernels(mode: str, path: str) -> Callable[[Any], Tensor]:
    def run(model: Any) -> Tensor:
        kernels.left_to_torch, fused.PATHS = (lambda shape: None), (path,)
        report = model.set_kernels(mode).report
        out = rolled_out(model, frames=3, num_inference_steps=1)
        assert {name.partition(",")[0] for name in report()["paths"]} == {path}, report()
        return out

    return run


def on_gpu(model: Any) -> Tensor:
    """With the kernels that a GPU takes by itself."""
    report = model.set_kernels("auto").report
    out = rolled_out(model)
    assert set(report()["paths"]) - {"torch"}, report()
    return out


def compiled(model: Any) -> Tensor:
    if model.parallel is not None:
        model.blocks[0].compile(backend="eager")
    return rolled_out(model)


def experts(model: Any) -> Tensor:
    other = model_of(EXACT, seed=3).to(model.device)
    other.parallel = model.parallel
    model.noise_range, other.noise_range = (0.5, 1.0), (0.0, 0.5)
    return rolled_out([model, other])


def start(frames: int) -> Tensor:
    return torch.randn(1, 2, frames, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(7))


FAR = {"family": "anyflow_far", "causal": None, "chunk_partition": [1, 2, 2, 2], "full_chunk_limit": 2}
FAR |= {"compressed_patch_size": (1, 4, 4)}
# For the interpreter: two heads for each of two processes.
SMALL = {"layers": 1, "heads": 4}
Case = tuple[Callable[[], Any], Callable[[Any], Tensor]]
CASES: dict[str, Case] = {
    "dense": (model_of, rolled_out),
    **{f"{v['position']}, {v['own_chunk']}": (lambda v=v: model_of(v), rolled_out) for v in pico.VARIANTS},
    "shared latent": (lambda: model_of(EXACT | {"layers_per_latent": 2}), rolled_out),
    "batch, guidance": (lambda: model_of(EXACT), lambda m: rolled_out(m, 2, guidance_scale=2.0, seed=[1, 2])),
    "held start": (lambda: model_of(EXACT), lambda m: rolled_out(m, start=start(3), hold_start=True)),
    "experts": (lambda: model_of(EXACT), experts),
    "streams": (lambda: model_of(EXACT), batched),
    "compiled": (lambda: model_of(EXACT), compiled),
    "skyreels_v2": (lambda: model_of(EXACT, family="skyreels_v2"), rolled_out),
    "anyflow_far": (lambda: model_of(**FAR), lambda m: rolled_out(m, size=(12, 12))),
    "anyflow_far, latent": (lambda: model_of(EXACT, **FAR), lambda m: rolled_out(m, size=(12, 12))),
    "kernels, dense": (lambda: model_of(**SMALL), with_kernels("triton", "expand")),
    "kernels, absorbed": (lambda: model_of(pico.VARIANTS[0], **SMALL), with_kernels("triton", "absorbed")),
    "kernels, baked": (lambda: model_of(pico.VARIANTS[4], **SMALL), with_kernels("triton", "expand")),
    "kernels, derived, latent": (lambda: model_of(pico.VARIANTS[3], **SMALL), with_kernels("triton", "expand")),
    "kernels, compared": (lambda: model_of(EXACT, **SMALL), with_kernels("auto", "expand")),
    ON_GPU: (lambda: model_of(EXACT).bfloat16(), on_gpu),
}


def cached(bits: Any) -> Case:
    def make() -> Any:
        model = model_of(EXACT | {"layers_per_latent": 2})
        model.set_cache(bits)
        return model

    return make, rolled_out


CASES |= {name: cached(bits) for name, bits in CACHES.items()}


class Counted:
    """Counts the numbers that this process sends to others."""

    def __init__(self) -> None:
        self.sent, self.exchange = 0, dist.all_to_all_single

    def __call__(self, received: Tensor, sent: Tensor, receives: list[int], sends: list[int], group: Any) -> None:
        self.sent += (sum(sends) - sends[group.rank()]) * sent[0].numel()
        self.exchange(received, sent, receives, sends, group)


@torch.no_grad()
def numbers_sent(settings: dict[str, Any] | None, group: Any, device: str) -> list[int]:
    """Numbers sent in a pass over a full chunk that does not write, and in one that does."""
    model = model_of(settings).to(device)
    model.set_parallel(group)
    shapes = (1, 2, 2, HEIGHT, WIDTH), (1,), (1, 3, 8)
    chunk = *(torch.zeros(shape, device=device) for shape in shapes), model.init_cache(1, HEIGHT, WIDTH)
    counts = []
    for write in (False, True):
        dist.all_to_all_single = counted = Counted()
        model.forward_chunk(*chunk, write=write)
        dist.all_to_all_single = counted.exchange
        counts.append(counted.sent)
    return counts


def main(out: str, slow: str, device: str) -> None:
    """Write to a file in `out` what was found; `slow`: also kernels, in Triton's interpreter, and torch.compile."""
    torch.set_num_threads(1)
    if slow == "yes":
        importlib.import_module("interpreter").patch_language_once()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    group = dist.group.WORLD
    found: dict[str, Any] = {}
    for name, (make, run) in CASES.items():
        if (slow == "no" and name.startswith(("kernels", "compiled"))) or (device == "cpu" and name == ON_GPU):
            continue
        alone, shared = make().to(device), make().to(device)
        shared.set_parallel(group)
        with torch.no_grad():
            found[name] = pico.relative_error(run(shared), run(alone))
    found["different"] = {what: refused(group, device, what) for what in ("noise", "prompts")}
    found["cache"] = model_caches(group)
    found["sent"] = {"dense": numbers_sent(None, group, device)}
    for own in ("exact", "latent"):
        found["sent"][own] = numbers_sent(EXACT | {"own_chunk": own}, group, device)
    Path(out, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def refused(group: Any, device: str, what: str) -> bool:
    """Whether processes that begin with different noise or prompts are refused."""
    model, rank = model_of(EXACT).to(device), dist.get_rank()
    model.set_parallel(group)
    text = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(rank if what == "prompts" else 0))
    chunks = stream_chunks(model, text, 2, HEIGHT, WIDTH, seed=rank if what == "noise" else 0, num_inference_steps=1)
    try:
        with torch.no_grad():
            next(iter(chunks))
    except UserError as error:
        return "began a video with different noise, prompts or weights" in str(error)
    return False


def model_caches(group: Any) -> list[int]:
    """Bytes of the caches of a dense model alone, and of a process's share."""
    model = model_of()
    sizes = [model.init_cache(1, HEIGHT, WIDTH).bytes()]
    model.set_parallel(group)
    return [*sizes, model.init_cache(1, HEIGHT, WIDTH).bytes()]


if __name__ == "__main__":
    main(*sys.argv[1:])
