"""Adapters on layers that a stage leaves frozen, and blocks that are recomputed or compiled."""

from __future__ import annotations

import distill_case as case
import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from mla_convert.distill.adapters import adapted_modules
from mla_convert.distill.trainable import trainable_names
from mla_convert.distill.trainer import run_stage
from mla_convert.errors import UsageError
from mla_convert.export.checkpoint import load_checkpoint, save_checkpoint

LORA = {"rank": 3, "alpha": 6}
CHANGES = {"trainable": "attention", "lora": LORA}


def test_adapters_go_where_nothing_is_trained():
    model = case.tiny_model()
    trained = trainable_names(model, "attention")
    config = case.make_config(**CHANGES).lora
    chosen = adapted_modules(model, config, trained)
    frozen = {"attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"}
    assert {name.split(".", 2)[2] for name in chosen} == frozen
    some = config.model_copy(update={"target_modules": ("to_q", "net.2")})
    assert {name.split(".", 2)[2] for name in adapted_modules(model, some, trained)} == {"attn2.to_q", "ffn.net.2"}
    with pytest.raises(UsageError, match=r"no frozen linear layer is called to_x; choose from attn2\.to_k, "):
        adapted_modules(model, config.model_copy(update={"target_modules": ("to_x",)}), trained)
    with pytest.raises(UsageError, match="lora finds no frozen linear layer"):
        adapted_modules(model, config, trained, "attn1")


def test_adapters_are_trained_saved_and_merged(tmp_path):
    """The student ends without adapters: its weights are those from before plus the saved adapters."""
    teacher = case.tiny_model()
    student = case.perturbed(teacher)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    data = case.Clips()
    config = case.make_config(**CHANGES)
    run_stage(config, student, {"teacher": teacher}, data, data.heldout(), tmp_path, 0, 0)
    after = student.state_dict()
    assert list(after) == list(before)
    assert not hasattr(student, "peft_config")

    settings = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (settings.r, settings.lora_alpha) == (3, 6)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = {name.removesuffix(".lora_A.weight") for name in adapter if ".lora_A." in name}
    assert {f"{name}.weight" for name in names} == {
        name for name in before if not torch.equal(after[name], before[name]) and ".attn1." not in name
    }
    for name in names:
        added = 2 * adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
        assert added.abs().max() > 0
        # Observed: 7.5e-9.
        assert torch.allclose(after[f"{name}.weight"], before[f"{name}.weight"] + added, atol=1e-6)

    save_checkpoint(student, tmp_path / "model", {})
    assert all(torch.equal(t, after[n]) for n, t in load_checkpoint(tmp_path / "model").state_dict().items())


def test_adapters_resume_exactly(tmp_path):
    _, expected = case.train(tmp_path / "whole", **CHANGES)
    with pytest.raises(case.Killed):
        case.train(tmp_path / "resumed", last_clip=9, **CHANGES)
    # The global generator is elsewhere when a run is resumed.
    torch.manual_seed(99)
    result, weights = case.train(tmp_path / "resumed", **CHANGES)
    assert result.resumed_from == 3
    assert case.outputs(tmp_path / "resumed") == case.outputs(tmp_path / "whole")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_adapters_of_match_attention_stay_in_the_attention(tmp_path):
    changes = {"stage": "match_attention", "trainable": "attention", "lora": LORA}
    with pytest.raises(UsageError, match="lora finds no frozen linear layer"):
        case.train(tmp_path, **changes)


def test_recomputed_blocks_train_alike(tmp_path):
    _, expected = case.train(tmp_path / "kept", steps=3)
    teacher = case.tiny_model()
    student = case.perturbed(teacher)
    config = case.make_config(steps=3, gradient_checkpointing=True)
    run_stage(config, student, {"teacher": teacher}, case.Clips(), case.Clips().heldout(), tmp_path / "again", 0, 0)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in student.state_dict().items())
    assert not student.is_gradient_checkpointing


def test_compiled_blocks_train_alike(tmp_path):
    def trained(name, **changes):
        student = case.perturbed(case.tiny_model())
        config = case.make_config(steps=2, teacher_weight=0.0, warmup_steps=0, **changes)
        result = run_stage(config, student, {}, case.Clips(), None, tmp_path / name, 0, 0)
        assert all(block._compiled_call_impl is None for block in student.blocks)
        return result.final_loss, student.state_dict()

    (loss, eager), (same, compiled) = trained("1"), trained("2", compile=True, compile_backend="eager")
    # Observed: 0 in the loss and in the weights.
    assert same == pytest.approx(loss, rel=1e-5)
    error = max((compiled[name] - tensor).abs().max().item() for name, tensor in eager.items())
    assert error < 1e-4


def test_match_attention_is_not_compiled():
    with pytest.raises(ValueError, match="match_attention hooks into the blocks"):
        case.make_config("match_attention", compile=True)
