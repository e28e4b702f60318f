"""What the first process of a launch tells the others, through a real store in one process."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mla_convert.errors import UserError
from mla_convert.run import launch
from mla_convert.run.launch import Launch


def process_of(store: Any, rank: int) -> Launch:
    """A process of a launch of two that have met at `store`."""
    one = object.__new__(Launch)
    one.group, one.leads = types.SimpleNamespace(size=lambda: 2, rank=lambda: rank), rank == 0  # type: ignore[assignment]
    one._store, one._words = store, 0
    one._in_pass, one._received = False, []
    return one


@pytest.fixture
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)


def test_a_word_may_be_larger_than_the_store_takes_at_once(store: Any) -> None:
    """A prompt of Wan, `[1, 512, 4096]` in float32, is 8 MiB, which torch's store refuses."""
    first, other = process_of(store, 0), process_of(store, 1)
    word = torch.randn(9 << 18, generator=torch.Generator().manual_seed(0))
    first.say({"embeds": word})
    first.say("next")
    assert torch.equal(other.hear()["embeds"], word) and other.hear() == "next"
    for number in range(32):
        first.say(number)
        assert other.hear() == number
    # 16 words are kept, each of one piece; the large one has gone with all of its pieces.
    assert store.num_keys() == 2 * 16


def test_gpus_of_several_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would choose its own kernels, which exchange different things."""

    def gathered(names: list[str], own: str, group: Any) -> None:
        names[:] = [own, others]

    monkeypatch.setattr(dist, "all_gather_object", gathered)
    monkeypatch.setattr(launch, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "L4")
    others = "L4"
    launch._check_one_kind(types.SimpleNamespace(size=lambda: 2))  # type: ignore[arg-type]
    others = "A100"
    with pytest.raises(UserError, match=r"^one video needs GPUs of one kind, but this launch has A100 and L4; leave"):
        launch._check_one_kind(types.SimpleNamespace(size=lambda: 2))  # type: ignore[arg-type]


def test_the_end_of_the_store_does_not_hide_the_error_that_ended_the_video() -> None:
    def gone(*given: Any) -> Any:
        raise dist.DistNetworkError("the store is gone")

    first = process_of(types.SimpleNamespace(set=gone, add=gone, check=lambda keys: False), 0)
    with pytest.raises(ValueError, match="of the video"), first.leading():
        raise ValueError("of the video")
