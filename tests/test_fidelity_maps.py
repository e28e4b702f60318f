"""Attention maps and worst clips of constructed pairs of models with known figures."""

from __future__ import annotations

import copy
import math

import pico
import pyarrow.parquet as pq
import pytest
import torch

from mla_convert.distill.clip_shards import Clip, write_latents
from mla_convert.distill.data import DataConfig, DigitClips, LatentClips, open_data
from mla_convert.distill.latents import LatentShards
from mla_convert.distill.objective import noised_clips
from mla_convert.evaluate.attention_maps import AttentionMaps, divergence, head_logits
from mla_convert.evaluate.fidelity import _AttentionError, fidelity
from mla_convert.evaluate.fidelity_section import HEADS, worst_clips, worst_heads
from mla_convert.evaluate.report import render_html
from mla_convert.evaluate.worst_clips import WORST, ClipErrors, heldout_prompts
from mla_convert.mla.core import attend
from mla_convert.zoo.digits.data import all_prompts, prompt_of


def pico_clips(count: int = 6, frames: int = 8) -> dict[str, torch.Tensor]:
    latents, _, text = pico.inputs(count, frames, 6, 4)
    return {"latents": latents, "encoder_hidden_states": text}


def maps(student, teacher, queries: int = 1000):
    """`AttentionMaps` of one noised batch with clean history."""
    found = AttentionMaps(student, teacher, queries)
    clips, generator = pico_clips(), torch.Generator().manual_seed(0)
    inputs = noised_clips(clips["latents"], clips["encoder_hidden_states"], teacher.causal, generator)
    with torch.no_grad():
        teacher(
            inputs.x_t, 1000 * inputs.t, inputs.text, context=inputs.context, context_timestep=1000 * inputs.t_context
        )
    return found.close()


def test_divergence_of_two_keys_by_hand() -> None:
    teacher = torch.zeros(1, 1, 1, 2)
    student = torch.tensor([3.0, 1.0]).log().expand(1, 1, 1, 2)
    variation, kl, squared, on_history, student_on_history = divergence(teacher, student, 1)[:, 0].tolist()
    assert variation == pytest.approx(0.25, abs=1e-6)
    assert kl == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), abs=1e-6)
    assert squared == pytest.approx((math.log(3) / 2) ** 2, abs=1e-6)
    assert (on_history, student_on_history) == (pytest.approx(0.5), pytest.approx(0.75))
    assert divergence(teacher, teacher + 7, 1)[:3].abs().max() < 1e-12


def test_a_model_and_itself_do_not_differ() -> None:
    teacher = pico.dense_model()
    for layer in maps(copy.deepcopy(teacher), teacher):
        assert layer["total_variation"] == layer["kl_divergence"] == layer["logit_error"] == [0.0, 0.0]
        assert layer["history_share"]["teacher"] == layer["history_share"]["student"]


@pytest.mark.parametrize("settings", pico.lossless(2, 12, "exact") + pico.lossless(2, 12, "latent"), ids=str)
def test_a_lossless_conversion_looks_where_its_teacher_looks(settings) -> None:
    teacher = pico.dense_model()
    for layer in maps(pico.convert(teacher, **settings), teacher):
        assert max(layer["total_variation"]) < 2e-6  # observed 1.2e-7


def test_swapped_heads_differ_as_the_teachers_heads_do() -> None:
    """The heads of layer 1 are swapped, and the output's columns too: the same model, but the maps are swapped."""
    teacher = pico.dense_model()
    student = copy.deepcopy(teacher)
    attention = student.blocks[1].attn1
    order = torch.arange(24).view(2, 12).flip(0).flatten()
    with torch.no_grad():
        for module in (attention.to_q, attention.to_k, attention.to_v):
            module.weight.copy_(module.weight[order])
            module.bias.copy_(module.bias[order])
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight.copy_(norm.weight[order])
        attention.to_out[0].weight.copy_(attention.to_out[0].weight[:, order])
    expected = []

    def own_heads(module, args, out) -> None:
        for logits, _ in head_logits(module, args[0], args[3], 1000):
            p = logits.softmax(-1)
            expected.append((p[:, 0] - p[:, 1]).abs().sum(-1).flatten() / 2)

    hook = teacher.blocks[1].attn1.register_forward_hook(own_heads)
    first, second = maps(student, teacher)
    hook.remove()
    assert max(first["total_variation"]) == 0
    known = torch.cat(expected).mean().item()
    assert known > 0.05
    assert second["total_variation"] == pytest.approx([known, known], rel=1e-5)
    assert second["history_share"]["student"] == pytest.approx(second["history_share"]["teacher"][::-1], rel=1e-5)


def test_one_perturbed_head_is_found_and_named() -> None:
    teacher = pico.dense_model()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.blocks[0].attn1.norm_q.weight[12:] *= 3
    spread = []

    def own_logits(module, args, out) -> None:
        for logits, _ in head_logits(module, args[0], args[3], 1000):
            spread.append(logits[:, 1].var(-1, correction=0).flatten())

    hook = teacher.blocks[0].attn1.register_forward_hook(own_logits)
    found = maps(student, teacher)
    hook.remove()
    assert found[0]["total_variation"][0] == 0 and found[0]["total_variation"][1] > 0.05
    # Queries of three times the length: the logits differ by twice the teacher's own.
    assert found[0]["logit_error"][1] == pytest.approx(2 * torch.cat(spread).mean().sqrt().item(), rel=1e-4)
    rows = worst_heads(found)
    assert len(rows) == min(HEADS, 4) and rows[0]["name"] == "layer 0, head 1"


@pytest.mark.parametrize("family", sorted(pico.BUILDERS))
@pytest.mark.parametrize("settings", [None, *pico.VARIANTS], ids=str)
def test_the_logits_are_those_that_attention_uses(family, settings, monkeypatch) -> None:
    """The softmax of `head_logits` equals that of the queries and keys that the layer passes to `attend`."""
    from mla_convert.mla import attention

    model = pico.dense_model(family=family, causal=None if family == "anyflow_far" else pico.WINDOW)
    if settings is not None:
        model = pico.convert(model, **settings)
    used, said = [], []

    def record(segments, scale):
        if len(segments) > 1:
            used.append(torch.cat([torch.einsum("bqhd,bkhd->bhqk", q, k) * scale for q, k, _ in segments], -1))
        return attend(segments, scale)

    def ask(module, args, out) -> None:
        said.extend(logits for logits, _ in head_logits(module, args[0], args[3], 1000))

    monkeypatch.setattr(attention, "attend", record)
    for block in model.blocks:
        block.attn1.register_forward_hook(ask)
    latents, timestep, text = pico.inputs(2, 8, 6, 4)
    given = {"r_timestep": timestep} if model.flow_map else {}
    with torch.no_grad():
        model(latents, timestep, text, **given)
    assert len(used) == len(said) > 0
    for expected, actual in zip(used, said, strict=True):
        assert torch.allclose(actual, expected, atol=1e-5)  # observed 0


def test_fewer_queries_estimate_the_same() -> None:
    teacher = pico.dense_model()
    student = pico.convert(teacher, **pico.LAYOUTS[0])
    every, few = (maps(student, teacher, queries)[1]["total_variation"] for queries in (1000, 6))
    assert few == pytest.approx(every, rel=0.5) and few != every


def test_layers_are_compared_without_waiting_for_the_device(monkeypatch) -> None:
    """Until the end, nothing is read off a tensor."""

    def unread(*_):
        raise AssertionError("read while a layer was compared")

    compared = []
    for kind in (AttentionMaps, _AttentionError):

        def watched(self, *given, compare=kind._compare):
            with pytest.MonkeyPatch.context() as patch:
                for name in ("__float__", "__bool__", "item", "tolist", "cpu", "numpy"):
                    patch.setattr(torch.Tensor, name, unread)
                compare(self, *given)
            compared.append(type(self))

        monkeypatch.setattr(kind, "_compare", watched)
    teacher = pico.dense_model()
    found = fidelity(pico.convert(teacher, **pico.LAYOUTS[0]), teacher, pico_clips(), 4, 0)
    assert compared.count(AttentionMaps) == compared.count(_AttentionError) == 2 * len(teacher.blocks)
    assert all(0 < error < 10 for error in found["attention_rel_error"])


def test_no_history_no_maps() -> None:
    teacher = pico.dense_model(causal={"num_frames_per_block": 8, "window_frames": 8, "sink_frames": 0})
    assert maps(copy.deepcopy(teacher), teacher) == []


def test_clip_errors_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(6, 1, 3, 8, 8, generator=generator).clamp(-1, 1)
    causal = pico.dense_model().causal
    inputs = noised_clips(clips, torch.zeros(6, 3, 8), causal, generator)
    expected = inputs.target + 0.5
    factors = torch.tensor([1.0, 1.2, 1.0, 2.0, 1.1, 1.0]).view(-1, 1, 1, 1, 1)
    errors = ClipErrors()
    for part, own in zip((slice(0, 4), slice(4, 6)), inputs.split(4), strict=True):
        errors.add(own, expected[part], (factors * expected)[part])
    result = errors.result([f"prompt {index}" for index in range(6)])
    worst = result["worst"]
    assert [clip["clip"] for clip in worst[:3]] == [3, 1, 4] and len(worst) == WORST
    assert [clip["velocity_rel_error"] for clip in worst[:3]] == pytest.approx([1.0, 0.2, 0.1], rel=1e-5)
    assert worst[0]["prompt"] == "prompt 3" and worst[0]["teacher_loss"] == pytest.approx(0.25, rel=1e-5)
    assert result["median"] == pytest.approx(0.05, rel=1e-4) and result["clips"] == 6
    pictures = worst[0]["pictures"]
    assert [strip["name"] for strip in pictures["strips"]] == ["clip", "teacher", "student", "difference × 20"]
    assert all(len(strip["frames"]) == 3 for strip in pictures["strips"])
    shown = worst_clips(result)["clips"]
    assert shown[0]["name"] == "prompt 3" and shown[0]["error"].replace("\N{NO-BREAK SPACE}", " ") == "100.0 %"


def test_a_student_that_is_not_a_number_is_the_worst() -> None:
    inputs = noised_clips(
        torch.zeros(3, 1, 3, 8, 8), torch.zeros(3, 3, 8), pico.dense_model().causal, torch.Generator()
    )
    actual = inputs.target.clone()
    actual[1] = float("nan")
    errors = ClipErrors(1)
    errors.add(inputs, inputs.target, actual)
    assert [clip["clip"] for clip in errors.result(["", "", ""])["worst"]] == [1]


def test_the_report_shows_heads_and_clips() -> None:
    teacher = pico.dense_model()
    student = pico.convert(teacher, **pico.LAYOUTS[0])
    clips = pico_clips()
    found = fidelity(student, teacher, clips, 4, 0, prompts=[f"clip <{index}>" for index in range(6)])
    worst = found["by_clip"]["worst"][0]
    assert worst["velocity_rel_error"] >= found["velocity_rel_error"]
    html = render_html({key: found[key] for key in ("attention_maps", "by_clip")})
    assert "Attention maps by layer" in html and "Worst clips" in html and f"clip &lt;{worst['clip']}&gt;" in html
    assert html.count('<th scope="row">layer') == 4


def test_prompts_are_read_off_embeddings_and_captions(tmp_path) -> None:
    assert all(
        prompt_of(prompt.embedding()) == prompt for split in ("train", "heldout") for prompt in all_prompts(split)
    )
    data = open_data(DataConfig(), 0)
    assert isinstance(data, DigitClips)
    prompts = heldout_prompts(data, data.heldout(3)["encoder_hidden_states"])
    assert len(prompts) == 3 and all(" moving " in prompt for prompt in prompts)
    drawn = [Clip(torch.randn(2, 3, 4, 4), torch.randn(3, 8), caption=f"a cat, take {take}") for take in range(5)]
    shards = write_latents(tmp_path / "with", drawn, clips_per_shard=5)
    data = open_data(DataConfig(kind="latents", folder=str(tmp_path / "with"), heldout=2, split="last"), 0)
    assert isinstance(data, LatentClips)
    assert heldout_prompts(data, data.heldout()["encoder_hidden_states"]) == ["a cat, take 3", "a cat, take 4"]
    (tmp_path / "without").mkdir()
    pq.write_table(pq.read_table(shards[0]).drop(["caption"]), tmp_path / "without" / "shard.parquet")
    assert LatentShards(tmp_path / "without").caption(4) == ""
