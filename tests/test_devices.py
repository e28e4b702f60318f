"""Where tensors lie, by a GPU that is pretended."""

from __future__ import annotations

import pytest
import torch
from pretend_gpu import GPU, pretended
from torch import nn


def test_the_pretended_gpu_refuses_what_a_gpu_refuses() -> None:
    with pretended():
        here, there = torch.ones(3, 3), torch.ones(3, 3, device=GPU)
        assert there.device == GPU and (there @ there).device == GPU
        assert here.to(GPU).device == GPU and there.cpu().device.type == "cpu"
        assert there[torch.tensor([0, 2])].shape == (2, 3)
        for mixed in (lambda: here + there, lambda: there.add_(here), lambda: torch.cat([here, there])):
            with pytest.raises(RuntimeError, match="expected all tensors on cuda"):
                mixed()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, generator=torch.Generator(), device=GPU)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def test_a_network_learns_on_the_pretended_gpu_as_it_does_on_the_cpu() -> None:
    def learnt(device: torch.device) -> torch.Tensor:
        torch.manual_seed(0)
        layer, x = nn.Linear(4, 3), torch.linspace(-1, 1, 8).view(2, 4).to(device)
        parameters = list(layer.parameters())
        layer.to(device)
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()
        return layer.weight.detach().cpu()

    expected = learnt(torch.device("cpu"))
    with pretended():
        actual = learnt(GPU)
    # Observed no difference.
    torch.testing.assert_close(actual, expected)
