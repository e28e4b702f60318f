"""Adapters of a source: read in every published form, added as peft adds them, or refused by name."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from peft import LoraConfig, get_peft_model
from recipe_case import digests, write_recipe, write_teacher
from safetensors.torch import save_file

from mla_convert.cli import main
from mla_convert.convert import ConvertConfig, convert_source
from mla_convert.errors import UserError
from mla_convert.export.checkpoint import save_checkpoint
from mla_convert.families.wan_files import original_names
from mla_convert.load import AdapterConfig, Source, load_dense, load_source

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
RANK, ALPHA = 3, 5.0
# Products in float32, against the same in float64; observed 1.7e-7.
TOLERANCE = 5e-7


@pytest.fixture(scope="module")
def dense() -> Any:
    return pico.dense_model()


@pytest.fixture
def base(tmp_path: Path, dense: Any) -> Path:
    dense.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="module")
def matrices(dense: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Up `[out, r]` and down `[r, in]` of every adapted module, by our name."""
    generator = torch.Generator().manual_seed(3)
    modules = {name: module for name, module in dense.named_modules() if name.endswith(tuple(TARGETS))}
    assert len(modules) == 2 * 10
    return {
        name: tuple(
            torch.randn(shape, generator=generator) for shape in ((m.out_features, RANK), (RANK, m.in_features))
        )
        for name, m in modules.items()
    }


def expected(dense: Any, matrices: Any, factor: float) -> dict[str, torch.Tensor]:
    """The weights with adapters, in float64."""
    state = {name: tensor.double() for name, tensor in dense.state_dict().items()}
    for module, (up, down) in matrices.items():
        state[f"{module}.weight"] += factor * up.double() @ down.double()
    return state


def distance(source: Source, wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference in a tensor, relative to its largest value."""
    assert sorted(source.tensors) == sorted(wanted)
    pairs = [(source.tensors[name].double(), tensor) for name, tensor in wanted.items()]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def their_name(module: str) -> str:
    (theirs,) = original_names([f"{module}.weight"])
    return theirs.removesuffix(".weight")


def peft_names(matrices: Any, prefix: str, names: Any = lambda module: module) -> dict[str, torch.Tensor]:
    state = {}
    for module, (up, down) in matrices.items():
        state[f"{prefix}{names(module)}.lora_A.weight"] = down
        state[f"{prefix}{names(module)}.lora_B.weight"] = up
    return state


def kohya_names(matrices: Any) -> dict[str, torch.Tensor]:
    """One flat name per module with alpha beside it, as kohya's scripts and musubi-tuner write them."""
    state = {}
    for module, (up, down) in matrices.items():
        flat = f"lora_unet_{their_name(module).replace('.', '_')}"
        state |= {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down, f"{flat}.alpha": torch.tensor(ALPHA)}
    return state


def write(folder: Path, form: str, matrices: Any) -> tuple[AdapterConfig, float]:
    """An adapter file in one of the published forms, its name in a recipe, and its factor."""
    folder.mkdir(exist_ok=True)
    path = folder / "adapter_model.safetensors"
    if form in ("peft", "rslora"):
        save_file(peft_names(matrices, "base_model.model."), path)
        told = {"peft_type": "LORA", "lora_alpha": ALPHA, "r": RANK, "use_rslora": form == "rslora"}
        (folder / "adapter_config.json").write_text(json.dumps(told))
        return AdapterConfig(model=str(folder)), ALPHA / (math.sqrt(RANK) if form == "rslora" else RANK)
    if form == "diffusers":
        header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": ALPHA, "transformer.r": RANK})}
        save_file(peft_names(matrices, "transformer."), folder / "pytorch_lora_weights.safetensors", header)
        return AdapterConfig(model=str(folder)), ALPHA / RANK
    if form == "comfyui":
        save_file(peft_names(matrices, "diffusion_model.", their_name), path)
        return AdapterConfig(model=str(path), alpha=ALPHA, scale=0.5), 0.5 * ALPHA / RANK
    if form == "kohya":
        save_file(kohya_names(matrices), path)
        return AdapterConfig(model=str(path), scale=-2.0), -2 * ALPHA / RANK
    assert form == "longlive"
    state = peft_names(matrices, "base_model.model.model.", their_name)
    critic = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"generator_lora": state, "critic_lora": critic, "step": 3}, folder / "lora.pt")
    return AdapterConfig(model=str(folder), file="lora.pt"), 1.0


@pytest.mark.parametrize("form", ["peft", "rslora", "diffusers", "comfyui", "kohya", "longlive"])
def test_published_adapter_is_added(tmp_path: Path, base: Path, dense: Any, matrices: Any, form: str) -> None:
    config, factor = write(tmp_path / "lora", form, matrices)
    source = load_source(str(base), adapters=[config])
    assert distance(source, expected(dense, matrices, factor)) < TOLERANCE


def test_peft_and_diffusers_add_the_same(tmp_path: Path, base: Path, dense: Any) -> None:
    """Files that the libraries write themselves, compared with the weights that the libraries compute from them."""
    torch.manual_seed(4)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(dense), lora)
    wrapped.save_pretrained(tmp_path / "peft")
    model = copy.deepcopy(dense)
    model.add_adapter(lora)
    model.save_lora_adapter(tmp_path / "diffusers")
    model.fuse_lora()
    model.unload_lora()
    for folder, merged in (("peft", wrapped.merge_and_unload()), ("diffusers", model)):
        source = load_source(str(base), adapters=[AdapterConfig(model=str(tmp_path / folder))])
        assert distance(source, {name: x.double() for name, x in merged.state_dict().items()}) < TOLERANCE


def test_differences_and_several_adapters_add_up(tmp_path: Path, base: Path, dense: Any, matrices: Any) -> None:
    weight, bias, up, down = torch.randn(24, 24), torch.randn(24), torch.randn(24, 2), torch.randn(2, 24)
    parts = {"diff": weight, "diff_b": bias, "lora_up.weight": up, "lora_down.weight": down}
    query = {f"diffusion_model.blocks.1.self_attn.q.{name}": part for name, part in parts.items()}
    save_file(query, base / "diff.safetensors")
    first, factor = write(tmp_path / "lora", "peft", matrices)
    wanted = expected(dense, matrices, factor)
    wanted["blocks.1.attn1.to_q.weight"] += 0.5 * (weight.double() + up.double() @ down.double())
    wanted["blocks.1.attn1.to_q.bias"] += 0.5 * bias.double()
    # Without a model the file lies in the source's folder.
    second = AdapterConfig(file="diff.safetensors", scale=0.5)
    assert distance(load_source(str(base), adapters=[first, second]), wanted) < TOLERANCE


def test_weights_keep_their_dtype(tmp_path: Path, dense: Any, matrices: Any) -> None:
    """Only the sum is rounded, once."""
    half = copy.deepcopy(dense).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    config, factor = write(tmp_path / "lora", "peft", matrices)
    read = load_dense(load_source(str(tmp_path / "half"), adapters=[config])).state_dict()
    wanted = expected(half, matrices, factor)
    assert {name: x.dtype for name, x in read.items()} == {name: x.dtype for name, x in half.state_dict().items()}
    close = {name: (x.double() - wanted[name]).abs().max() / wanted[name].abs().max() for name, x in read.items()}
    assert max(close.values()) < 2**-8


def test_conversion_reads_what_a_merged_checkpoint_holds(tmp_path: Path, base: Path, matrices: Any) -> None:
    config, _ = write(tmp_path / "lora", "kohya", matrices)
    source = load_source(str(base), adapters=[config])
    load_dense(source).save_pretrained(tmp_path / "merged-model")
    settings = ConvertConfig(kv_lora_rank=10, calibration=pico.calibration())
    written = []
    for name, found in (("adapted", source), ("merged", load_source(str(tmp_path / "merged-model")))):
        converted = convert_source(found, settings, tmp_path / f"{name}-parts", pico.batches())
        save_checkpoint(converted.model, tmp_path / name, {}, tensors=converted.tensors)
        written.append(digests(tmp_path / name / "transformer"))
    assert written[0] == written[1]


def test_run_and_evaluation_have_the_adapted_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with an adapter equals that of the merged checkpoint, teacher's loss included, except for its source."""
    teacher = write_teacher(tmp_path / "teacher")
    matrices = {"blocks.0.attn1.to_v": (torch.randn(24, RANK), torch.randn(RANK, 24))}
    save_file(peft_names(matrices, ""), teacher / "lora.safetensors")
    adapters = [AdapterConfig(file="lora.safetensors")]
    load_dense(load_source(str(teacher), adapters=adapters)).save_pretrained(tmp_path / "merged-model")
    found = {}
    for name, folder, more in (
        ("adapted", teacher, "  adapters: [{file: lora.safetensors}]\n"),
        ("merged", tmp_path / "merged-model", ""),
    ):
        recipe = write_recipe(tmp_path / f"{name}.yaml", folder)
        recipe.write_text(recipe.read_text().replace("data:\n", f"{more}data:\n", 1))
        assert main(["run", str(recipe), "--out", str(tmp_path / name), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert main(["evaluate", str(tmp_path / name), "--out", str(tmp_path / f"{name}-again"), "--json"]) == 0
        again = json.loads(capsys.readouterr().out)
        keys = ("teacher_loss", "student_loss", "velocity_rel_error")
        found[name] = [one[key] for one in (report, again) for key in keys]
    assert found["adapted"] == found["merged"]
    manifest = json.loads((tmp_path / "adapted" / "checkpoint" / "mla_convert.json").read_text())
    (recorded,) = manifest["source"]["adapters"]
    assert recorded["file"] == "lora.safetensors" and recorded["scale"] == 1.0


def test_inspect_takes_adapters(base: Path, matrices: Any, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(peft_names(matrices, ""), base / "lora.safetensors")
    found = []
    for more in ([], ["--adapter", "lora.safetensors"], ["--adapter", str(base / "lora.safetensors")]):
        assert main(["inspect", str(base), "--ranks", "8,16", "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["layers"])
    assert found[0] != found[1] == found[2]


def refusal(base: Path, config: AdapterConfig) -> str:
    with pytest.raises(UserError) as caught:
        load_source(str(base), adapters=[config])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.9.attn1.to_q.lora_A.weight": (3, 24)}, "adapts blocks.9.attn1.to_q, which the model does not have"),
        ({"blocks.0.attn1.to_q.lora_A.weight": (3, 24)}, "without its other half"),
        ({"blocks.0.attn1.to_q.hada_w1_a": (3, 24)}, "is not a plain LoRA and cannot be added; merge it"),
        ({"blocks.0.attn1.to_q.lora_magnitude_vector": (24,)}, "is not a plain LoRA and cannot be added; merge it"),
        (
            {"blocks.0.attn1.to_q.lora_A.weight": (3, 30), "blocks.0.attn1.to_q.lora_B.weight": (24, 3)},
            "does not fit blocks.0.attn1.to_q.weight, for which the model has shape [24, 24]",
        ),
        ({"blocks.0.norm1.diff": (24,)}, "adapts blocks.0.norm1, which the model does not have"),
    ],
)
def test_what_cannot_be_added_is_refused(base: Path, changes: dict[str, Any], message: str) -> None:
    save_file({name: torch.randn(shape) for name, shape in changes.items()}, base / "lora.safetensors")
    assert message in refusal(base, AdapterConfig(file="lora.safetensors"))


@pytest.mark.parametrize("key", ["use_dora", "fan_in_fan_out", "alpha_pattern"])
def test_what_peft_does_otherwise_is_refused(tmp_path: Path, base: Path, matrices: Any, key: str) -> None:
    config, _ = write(tmp_path / "lora", "peft", matrices)
    told = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({**told, key: {"a": 1}}))
    assert f"sets {key}, which cannot be added" in refusal(base, config)


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_two_alphas_are_refused(tmp_path: Path, base: Path, matrices: Any, form: str) -> None:
    config, _ = write(tmp_path / "lora", form, matrices)
    assert "has alpha 5, but source.adapters has 8; leave it out" in refusal(
        base, config.model_copy(update={"alpha": 8.0})
    )
    assert load_source(str(base), adapters=[config.model_copy(update={"alpha": ALPHA})]).adapters


def test_files_that_are_not_there_or_hold_nothing(tmp_path: Path, base: Path) -> None:
    assert "has no file none.safetensors" in refusal(base, AdapterConfig(file="none.safetensors"))
    assert "pytorch_lora_weights.safetensors or adapter_model" in refusal(base, AdapterConfig(model=str(base)))
    assert "does not exist" in refusal(base, AdapterConfig(model="nowhere.safetensors"))
    torch.save({"generator_lora": {}}, base / "empty.pt")
    assert "holds no LoRA weights" in refusal(base, AdapterConfig(file="empty.pt"))
    bad = {"blocks.0.attn1.to_q.lora_A.weight": torch.full((3, 24), torch.nan)}
    save_file(bad | {"blocks.0.attn1.to_q.lora_B.weight": torch.ones(24, 3)}, base / "nan.safetensors")
    with pytest.raises(UserError, match="NaN or infinite"):
        load_dense(load_source(str(base), adapters=[AdapterConfig(file="nan.safetensors")]))
    with pytest.raises(ValueError, match="an adapter needs model, file, or both"):
        AdapterConfig(scale=2.0)


def test_a_file_below_the_home_folder_has_its_adapter_beside_it(
    tmp_path: Path, base: Path, matrices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config, _ = write(base, "peft", matrices)
    weights = next(base.glob("diffusion_pytorch_model*.safetensors"))
    beside = AdapterConfig(file=config.file or "adapter_model.safetensors", scale=config.scale)
    found = load_source(f"~/{weights.relative_to(tmp_path)}", adapters=[beside])
    same = load_source(str(weights), adapters=[beside])
    assert all(torch.equal(found.tensors[name], same.tensors[name]) for name in same.tensors)
    assert found.provenance()["model"] == str(weights.resolve())


def test_another_scale_is_another_conversion(tmp_path: Path, base: Path, matrices: Any) -> None:
    """Part files of a conversion with one scale are not reused for another."""
    config, _ = write(tmp_path / "lora", "peft", matrices)
    settings = ConvertConfig(kv_lora_rank=10, init="svd")
    written = []
    for scale, work in ((1.0, "parts"), (2.0, "parts"), (2.0, "fresh")):
        source = load_source(str(base), adapters=[config.model_copy(update={"scale": scale})])
        converted = convert_source(source, settings, tmp_path / work)
        written.append({name: converted.tensors[name].clone() for name in converted.tensors})
    same = [all(torch.equal(one[name], written[2][name]) for name in one) for one in written[:2]]
    assert same == [False, True]


def test_experts_have_adapters_of_their_own(tmp_path: Path) -> None:
    from mla_convert.errors import UsageError
    from mla_convert.recipe.load import load_recipe

    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path)
    text = recipe.read_text().replace(
        "data:\n", "  adapters: [{file: a.safetensors}]\nexperts: {a: [0.5, 1], b: [0, 0.5]}\ndata:\n", 1
    )
    recipe.write_text(text)
    with pytest.raises(UsageError, match=r"source.adapters belong to one model"):
        load_recipe(recipe)
