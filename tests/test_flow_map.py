"""Flow maps: the second time r is passed along with t in rollouts, training data, calibration and losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pico
import pytest
import torch
from torch import Tensor

from mla_convert import flow
from mla_convert.convert import ConvertConfig, convert_model
from mla_convert.convert.blocks import ModelBlocks
from mla_convert.convert.clips import enter_clips
from mla_convert.convert.config import CalibrationConfig
from mla_convert.convert.store import TensorStore
from mla_convert.distill.objective import flow_loss, noised_clips, predict_velocity, teacher_forcing_loss
from mla_convert.families.wan import FAMILY, CausalWanTransformer3DModel, MLAWanTransformer3DModel
from mla_convert.mla.window import CausalConfig
from mla_convert.registry import stages
from mla_convert.run.stream import stream_chunks

# Relative to the largest magnitude; the largest error seen on a CPU stands beside it.
FLOAT32 = 2e-6  # 2.4e-7
CAUSAL = CausalConfig(num_frames_per_block=2, window_frames=5, sink_frames=1)


class FlowMapWan(CausalWanTransformer3DModel):
    """Wan with a required second time, which changes the modulation."""

    flow_map = True

    def embed_conditions(
        self, timestep: Tensor, text: Tensor, image: Tensor | None, r_timestep: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        assert r_timestep is not None and r_timestep.shape == timestep.shape
        temb, modulation, tokens, image = super().embed_conditions(timestep, text, image)
        r_temb, r_modulation, _, _ = super().embed_conditions(r_timestep, text, image)
        return temb + r_temb / 2, modulation + r_modulation / 2, tokens, image


class MLAFlowMapWan(MLAWanTransformer3DModel, FlowMapWan):
    pass


FLOW_MAP = dataclasses.replace(FAMILY, name="flow_map", dense_class=FlowMapWan, mla_class=MLAFlowMapWan)


def flow_map_model(seed: int = 0) -> FlowMapWan:
    plain = pico.dense_model(seed=seed)
    model = FlowMapWan.from_config(plain.config)
    model.load_state_dict(plain.state_dict())
    return model.eval().requires_grad_(False)


def convert(dense: FlowMapWan, **settings: Any) -> Any:
    calibration = {"clips": 8, "batch_size": 4, "queries_per_chunk": 8}
    return convert_model(FLOW_MAP, dense, ConvertConfig(calibration=calibration, **settings), pico.batches())


def clips(count: int = 4) -> dict[str, Tensor]:
    latents, _, text = pico.inputs(count, 6, 6, 4)
    return {"latents": latents, "encoder_hidden_states": text}


def noised(model: Any, **settings: Any) -> Any:
    batch = clips()
    generator = torch.Generator().manual_seed(0)
    return noised_clips(batch["latents"], batch["encoder_hidden_states"], model.causal, generator, **settings)


def test_half_of_the_chunks_are_instantaneous() -> None:
    chunks = CAUSAL.chunks(40)
    t = flow.chunk_times(100, chunks, torch.Generator().manual_seed(0))
    r = flow.mean_times(t, chunks, torch.Generator().manual_seed(1))
    assert ((r >= 0) & (r <= t)).all()
    assert torch.equal(r[:, 0::2], r[:, 1::2])
    assert float((r == t).float().mean()) == pytest.approx(0.5, abs=0.03)  # 0.4995
    shares = (r / t)[r != t]
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)  # 0.4805


@pytest.mark.parametrize("settings", [{}, {"clean_history": False}, {"copies": 2, "context_noise": 0.4}], ids=str)
def test_second_times_leave_every_other_draw_as_it_was(settings: dict[str, Any]) -> None:
    plain, mapped = (noised(pico.dense_model(), flow_map=flow_map, **settings) for flow_map in (False, True))
    assert plain.r is None
    assert mapped.r is not None
    for name in ("x_t", "t", "text", "target", "context", "t_context"):
        a, b = getattr(plain, name), getattr(mapped, name)
        assert (a is None and b is None) or torch.equal(a, b)


def test_rollout_asks_for_every_step_and_writes_the_velocity() -> None:
    model = flow_map_model()
    calls: list[tuple[float, float, bool]] = []
    forward_chunk = model.forward_chunk

    def watched(x: Tensor, timestep: Tensor, *rest: Any, r_timestep: Tensor, **kwargs: Any) -> Tensor:
        assert len(set(timestep.tolist())) == len(set(r_timestep.tolist())) == 1
        calls.append((float(timestep[0]), float(r_timestep[0]), kwargs["write"]))
        return forward_chunk(x, timestep, *rest, r_timestep=r_timestep, **kwargs)

    model.forward_chunk = watched
    _, _, text = pico.inputs(2, 1, 6, 4)
    settings = {"num_inference_steps": 3, "shift": 3.0, "context_noise": 0.1, "guidance_scale": 2.0}
    list(stream_chunks(model, text, 4, 6, 4, **settings))
    times = (1000 * flow.sampling_times(3, 3.0)).tolist()
    steps = [(times[i], times[i + 1], False) for i in range(3)]
    for found, wanted in zip(calls, [*steps, (100.0, 100.0, True), *steps], strict=True):
        assert found == pytest.approx(wanted)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("flow_map", [False, True], ids=["instantaneous", "drawn"])
def test_packed_forward_equals_streaming(converted: bool, flow_map: bool) -> None:
    """The context of the packed forward has r = t, as in the pass that writes to a cache."""
    dense = flow_map_model()
    model = convert(dense, kv_lora_rank=16, position="rotate_on_read") if converted else dense
    batch = noised(model, context_noise=0.5, flow_map=flow_map)
    packed = predict_velocity(model, batch)
    cache, chunks = model.init_cache(4, 6, 4), []
    r = batch.t if batch.r is None else batch.r
    for a, b in model.causal.chunks(6):
        x, times, second = batch.x_t[:, :, a:b], 1000 * batch.t[:, a:b], 1000 * r[:, a:b]
        chunks.append(model.forward_chunk(x, times, batch.text, cache, r_timestep=second))
        context = 1000 * batch.t_context
        model.forward_chunk(batch.context[:, :, a:b], context, batch.text, cache, write=True, r_timestep=context)
    assert pico.relative_error(torch.cat(chunks, dim=2), packed) < FLOAT32


def test_losses_against_the_data_are_those_of_the_velocity() -> None:
    model, batch = flow_map_model(), clips()
    expected = predict_velocity(model, noised(model)._replace(r=None))
    instant = noised(model)
    loss = teacher_forcing_loss(
        model, batch["latents"], batch["encoder_hidden_states"], torch.Generator().manual_seed(0)
    )
    assert float(loss) == float((expected - instant.target).square().mean())
    assert flow_loss(model, batch, seed=0) == float(loss)


def test_stage_weighs_the_data_where_it_knows_the_answer() -> None:
    teacher, student = flow_map_model(), flow_map_model(seed=1)
    stage = stages()["match_velocity"]
    config = {"steps": 1, "learning_rate": 1e-3}
    models = {"teacher": teacher, "student": student}

    def run(weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        built = stage(stage.config_class(**config, teacher_weight=weight))
        return built.loss(models, clips(), torch.Generator().manual_seed(0))

    batch = noised(student, flow_map=True)
    actual, expected = predict_velocity(student, batch), predict_velocity(teacher, batch)
    instant = batch.r == batch.t
    assert 0 < int(instant.sum()) < instant.numel()
    known = instant[:, None, :, None, None].expand_as(actual)
    data = (actual - batch.target)[known].square().mean()
    loss, logs = run(0.75)
    assert float(logs["data_loss"]) == pytest.approx(float(data))
    assert float(loss) == pytest.approx(float(0.25 * data + 0.75 * (actual - expected).square().mean()))

    alone, _ = run(0.0)
    velocity = predict_velocity(student, batch._replace(r=None))
    assert float(alone) == pytest.approx(float((velocity - batch.target).square().mean()))


@pytest.mark.parametrize("metric", ["output", "velocity"])
def test_match_attention_works_on_flow_maps(metric: str) -> None:
    teacher = flow_map_model()
    student = convert(teacher, kv_lora_rank=16, position="rotate_on_read")
    stage = stages()["match_attention"]
    built = stage(stage.config_class(steps=1, learning_rate=1e-3, metric=metric))
    _, logs = built.loss({"teacher": teacher, "student": student}, clips(), torch.Generator().manual_seed(0))
    assert 0 < float(logs["attention_error"]) < 1


def test_calibration_draws_second_times_and_full_rank_loses_nothing() -> None:
    dense = flow_map_model()
    config = CalibrationConfig(clips=8, batch_size=4)
    entered = enter_clips(ModelBlocks(dense), pico.batches(), config, TensorStore())
    plain = enter_clips(ModelBlocks(pico.dense_model()), pico.batches(), config, TensorStore())
    for (t, r), (plain_t, plain_r) in zip(entered.times, plain.times, strict=True):
        assert torch.equal(t, plain_t)
        assert plain_r is None
        assert r is not None
        assert (r < t).any() and (r == t).any()

    model = convert(dense, **pico.lossless(2, 12, "exact")[0])
    latents, timestep, text = pico.inputs(2, 6, 6, 4)
    second = {"r_timestep": timestep / 3}
    expected = dense(latents, timestep, text, **second).sample
    assert pico.relative_error(model(latents, timestep, text, **second).sample, expected) < FLOAT32
    assert pico.relative_error(dense(latents, timestep, text, r_timestep=timestep).sample, expected) > 1e-3


def test_budget_measures_the_teacher_where_the_data_is_known() -> None:
    dense = flow_map_model()
    entered = enter_clips(ModelBlocks(dense), pico.batches(), CalibrationConfig(clips=8, batch_size=4), TensorStore())
    (t, r), target = entered.times[0], entered.targets[0]
    velocity = target + (r != t)[:, None, :, None, None] * 100 + 1
    assert entered.loss(0, velocity) == pytest.approx(1.0)
    budget = {"scalars_per_token": 12, "rank_multiple": 2}
    model = convert(dense, budget=budget, kv_lora_rank=None, position="rotate_on_read")
    assert sum(model.mla.kv_lora_rank) <= 24
