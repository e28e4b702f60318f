"""Image-to-video models: the image is a condition by name, and every forward agrees with stock diffusers."""

from __future__ import annotations

from typing import Any

import image_case as case
import pico
import pytest
import torch
from diffusers import WanTransformer3DModel

from mla_convert.families.wan import CausalWanTransformer3DModel

# Relative to the largest magnitude; the largest errors seen on a CPU stand beside them.
STOCK = 2e-6  # 3.4e-7
FLOAT32 = 2e-6  # 2.8e-7


@pytest.mark.parametrize("kind", case.KINDS)
def test_one_chunk_is_the_stock_forward(kind: str) -> None:
    model = case.model(kind, causal={"num_frames_per_block": 4, "window_frames": 4})
    config = {key: value for key, value in model.config.items() if not key.startswith("_") and key != "causal"}
    stock = WanTransformer3DModel(**config).eval()
    stock.load_state_dict(model.state_dict())
    (x, _), text, given = case.latents(4, 2), case.text(kind, 2), case.conditions(kind, 4, 2)
    t = torch.tensor([300.0, 900.0])
    whole = torch.cat([x, given.pop("image_latents")], dim=1)
    with torch.no_grad():
        expected = stock(whole, t, text, **given).sample
    named = model(x, t, text, image_latents=whole[:, case.CHANNELS :], **given).sample
    assert named.shape == x.shape
    assert pico.relative_error(named, expected) < STOCK
    assert torch.equal(model(whole, t, text, **given).sample, named)
    other = model(x, t, text, image_latents=whole[:, case.CHANNELS :] + 1, **given).sample
    assert pico.relative_error(other, expected) > 0.01


@pytest.mark.parametrize("kind", case.KINDS)
@pytest.mark.parametrize("variant", [None, {}, {"own_chunk": "latent"}], ids=["dense", "exact", "latent"])
def test_chunk_by_chunk_is_the_whole_clip(kind: str, variant: dict[str, Any] | None) -> None:
    model = case.model(kind) if variant is None else case.converted(case.model(kind), **variant)
    (x, t), text, given = case.latents(9, 2), case.text(kind, 2), case.conditions(kind, 9, 2)
    expected = model(x, t, text, **given).sample
    image = given.pop("image_latents")
    cache, parts = model.init_cache(2, case.HEIGHT, case.WIDTH), []
    for a, b in model.causal.chunks(9):
        chunk = (x[:, :, a:b], t[:, a:b], text, cache)
        parts.append(model.forward_chunk(*chunk, write=True, image_latents=image[:, :, a:b], **given))
    assert pico.relative_error(torch.cat(parts, dim=2), expected) < FLOAT32


@pytest.mark.parametrize("kind", case.KINDS)
def test_the_clean_context_of_teacher_forcing_has_its_image_too(kind: str) -> None:
    model = case.converted(case.model(kind))
    (x, t), (clean, _), text = case.latents(8, 2), case.latents(8, 2, seed=7), case.text(kind, 2)
    given = case.conditions(kind, 8, 2)
    packed = model(x, t, text, context=clean, **given).sample
    image = given.pop("image_latents")
    cache, parts = model.init_cache(2, case.HEIGHT, case.WIDTH), []
    for a, b in model.causal.chunks(8):
        now = {"image_latents": image[:, :, a:b], **given}
        parts.append(model.forward_chunk(x[:, :, a:b], t[:, a:b], text, cache, **now))
        model.forward_chunk(clean[:, :, a:b], 0 * t[:, a:b], text, cache, write=True, **now)
    assert pico.relative_error(torch.cat(parts, dim=2), packed) < FLOAT32


def test_what_a_model_is_conditioned_on_is_declared() -> None:
    assert case.model("wan2.1").needed_conditions == ("image_latents", "encoder_hidden_states_image")
    assert case.model("wan2.2").needed_conditions == ("image_latents",)
    assert pico.dense_model().needed_conditions == ()
    assert (case.model().noise_channels, pico.dense_model(out_channels=None).noise_channels) == (4, 2)
    assert CausalWanTransformer3DModel.condition_kinds["image_latents"] == "frames"
    names = case.model("wan2.2").state_dict().keys()
    assert list(names) == list(pico.dense_model().state_dict())


@pytest.mark.parametrize(
    ("channels", "image", "message"),
    [
        (4, None, "reads 12 channels, but there are hidden_states of 4 and no image_latents; give image_latents of 8"),
        (4, 5, "4 and image_latents of 5; give image_latents of 8 channels"),
        (12, 8, "leave image_latents out"),
    ],
)
def test_channels_that_do_not_fit_are_named(channels: int, image: int | None, message: str) -> None:
    model, shape = case.model("wan2.2"), (2, case.HEIGHT, case.WIDTH)
    given = {} if image is None else {"image_latents": torch.zeros(1, image, *shape)}
    with pytest.raises(ValueError, match=message) as caught:
        model(torch.zeros(1, channels, *shape), torch.zeros(1), case.text("wan2.2"), **given)
    assert "\n" not in str(caught.value)
