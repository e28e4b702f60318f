"""The asyncio server of docs/serving.md: viewers who are slow, who are canceled, who fail, and scarce memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pico
import pytest
import torch
from stream_case import FLOAT32, HEIGHT, WIDTH, alone, batch_of, prompt
from test_docs_code import ROOT, python_blocks
from torch import Tensor

from mla_convert.run.batch import RoundError, StreamBatch, StreamError


def encode(text: str) -> Tensor:
    return prompt(int(text))


def served(batch: StreamBatch, scene: Callable[[Any], Awaitable[Any]]) -> Any:
    """Run `scene` with a server of `batch`, then stop it."""
    (block,) = (x for x in python_blocks(ROOT / "docs/serving.md") if "class Server" in x.code)
    scope: dict[str, Any] = {"__name__": "serving"}
    exec(compile(block.code, str(block), "exec"), scope)

    async def main() -> Any:
        server = scope["Server"](batch, encode)
        rounds = asyncio.create_task(server.rounds())
        try:
            result = await asyncio.wait_for(scene(server), 120)
            assert not rounds.done() and not server.queues
            return result
        finally:
            rounds.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await rounds
            server.worker.shutdown()

    return asyncio.run(main())


async def whole(server: Any, text: str, **settings: Any) -> Tensor:
    return torch.cat([latents async for latents in server.stream(text, **settings)], dim=1)


def same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and pico.relative_error(actual, expected) < FLOAT32


def test_viewers_come_and_go() -> None:
    model = pico.dense_model()
    batch = batch_of(model, 2, when_full="queue")

    async def scene(server: Any) -> list[Tensor]:
        endless = asyncio.create_task(whole(server, "0"))
        first = asyncio.create_task(whole(server, "1", seed=1, num_frames=8))
        waits = asyncio.create_task(whole(server, "2", seed=2, num_frames=6))
        videos = [await first]
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        return [*videos, await waits]

    first, waited = served(batch, scene)
    same(first, alone(model, prompt(1), 8, 1))
    same(waited, alone(model, prompt(2), 6, 2))
    assert not batch.active and not batch.waiting and sorted(batch.pool.free) == [0, 1]


def test_a_slow_viewer_holds_up_nobody_and_misses_nothing() -> None:
    model = pico.dense_model()
    batch = batch_of(model, 2)

    async def scene(server: Any) -> tuple[Tensor, Tensor]:
        slow = server.stream("0", num_frames=16)
        made = [await anext(slow)]
        fast = await whole(server, "1", seed=1, num_frames=20)
        (queue,) = server.queues.values()
        assert queue.qsize() == server.ahead
        made += [latents async for latents in slow]
        return torch.cat(made, dim=1), fast

    slow, fast = served(batch, scene)
    same(slow, alone(model, prompt(0), 16))
    same(fast, alone(model, prompt(1), 20, 1))


def test_a_viewer_whose_source_fails_is_told_and_the_others_go_on() -> None:
    model = pico.dense_model()

    def camera(first: int, stop: int) -> Tensor:
        if first:
            raise OSError("gone")
        return torch.zeros(1, 2, stop - first, HEIGHT, WIDTH)

    async def scene(server: Any) -> Tensor:
        other = asyncio.create_task(whole(server, "1", seed=1, num_frames=8))
        with pytest.raises(StreamError, match="its source failed: OSError: gone"):
            await whole(server, "0", source=camera)
        return await other

    same(served(batch_of(model, 2), scene), alone(model, prompt(1), 8, 1))


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_passes_shrink_when_memory_is_scarce_and_a_pass_that_fails_ends_its_streams(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A RuntimeError is how torch says it on a CPU."""
    model = pico.dense_model()
    expected = [alone(model, prompt(seed), 8, seed) for seed in range(2)]
    forward = model.forward_chunk

    def scarce(x: Tensor, t: Tensor, text: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) > 1:
            raise kind("DefaultCPUAllocator: can't allocate memory")
        if torch.equal(text[0], prompt(9)):
            raise RuntimeError("unlucky")
        out: Tensor = forward(x, t, text, *args, **kwargs)
        return out

    monkeypatch.setattr(model, "forward_chunk", scarce)
    batch = batch_of(model, 3)

    async def scene(server: Any) -> list[Any]:
        viewers = [whole(server, str(seed), seed=seed, num_frames=8) for seed in range(2)]
        return await asyncio.gather(*viewers, whole(server, "9"), return_exceptions=True)

    *videos, failed = served(batch, scene)
    for video, wanted in zip(videos, expected, strict=True):
        same(video, wanted)
    assert isinstance(failed, RoundError) and "RuntimeError: unlucky" in str(failed)
    assert batch.lanes_per_pass == 1 and len(batch.pool.free) == 3
