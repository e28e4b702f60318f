"""What docs/extending.md promises: its code is the toy family, and the toy family is converted like any other."""

from __future__ import annotations

import ast
import configparser
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pico
import pytest
import torch
import toy_family
import toy_stage
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_family import FAMILY, CausalToyTransformer3DModel, MLAToyTransformer3DModel, ToyTransformer3DModel

from mla_convert import registry
from mla_convert.cli import main
from mla_convert.convert import ConvertConfig, convert_model
from mla_convert.distill.clip_shards import Clip, write_latents
from mla_convert.errors import UserError
from mla_convert.load import load_dense, load_source
from mla_convert.load.weights import CONFIG, WEIGHTS

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "extending.md").read_text(encoding="utf-8")
FLOAT32 = 2e-6  # relative to the largest magnitude; seen on a CPU: 3.0e-7
HEADS = 3
RECIPE = """
version: 1
name: toy
source: {{model: {source}}}
causal: {{num_frames_per_block: 2, window_frames: 6}}
data: {{kind: latents, folder: {data}, heldout: 2}}
convert: {{kv_lora_rank: 8, calibration: {{clips: 2, batch_size: 2}}}}
distill: [{{stage: toy_match_robust, delta: 0.5, steps: 2, learning_rate: 1e-3, batch_size: 2, tracker: null}}]
evaluate: {{clips: 2, batch_size: 2, rollout_prompts: 0, long_factor: 0}}
export: {{dtype: bfloat16}}
"""


def blocks(language: str) -> list[str]:
    """The code blocks of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def install(folder: Path, entry_points: str) -> Path:
    """A folder for `sys.path` with what pip would write for a package with these entry points."""
    info = folder / "toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return folder


@pytest.fixture(scope="module")
def entry_points() -> str:
    """The entry points of the page's pyproject.toml, as pip writes them."""
    (project,) = blocks("toml")
    parser = configparser.ConfigParser()
    parser.read_string(project)
    lines = []
    for section in parser.sections():
        group = re.fullmatch(r'project\.entry-points\."(.+)"', section)
        assert group is not None
        lines += [f"[{group[1]}]", *(f"{name} = {json.loads(value)}" for name, value in parser[section].items())]
    return "\n".join(lines)


@pytest.fixture(autouse=True, scope="module")
def installed(entry_points: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The toy as an installed package."""
    folder = install(tmp_path_factory.mktemp("site"), entry_points)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(pico.BUILDERS, "toy", functools.partial(CausalToyTransformer3DModel, motion_levels=4))
        registry.collect.cache_clear()
        yield folder
    registry.collect.cache_clear()


def test_the_page_shows_the_family_but_for_its_stock_model() -> None:
    """Every block is in the file, in order; only other libraries and the stock model are not shown."""
    text = (TESTS / "toy_family.py").read_text(encoding="utf-8")
    shown, rest = [block for block in blocks("python") if block in text], text
    assert len(shown) > 1
    assert [text.count(block) for block in shown] == [1] * len(shown)
    assert sorted(shown, key=text.index) == shown
    for block in shown:
        rest = rest.replace(block, "")
    left = ast.parse(rest).body[1:]
    assert {type(node) for node in left} == {ast.Import, ast.ImportFrom, ast.ClassDef}
    assert [node.name for node in left if isinstance(node, ast.ClassDef)] == [ToyTransformer3DModel.__name__]
    assert "mla_convert" not in rest


def test_the_page_shows_the_stage_and_nothing_that_is_not_tested() -> None:
    sources = [(TESTS / name).read_text(encoding="utf-8") for name in ("toy_family.py", "toy_stage.py")]
    assert [block for block in blocks("python") if block not in sources[0]] == [sources[1]]


def test_the_page_names_every_hook() -> None:
    for name in FAMILY.__dataclass_fields__:
        assert f"`{name}`" in PAGE


def test_the_installed_family_and_stage_are_found() -> None:
    assert registry.families()["toy"] is FAMILY
    assert registry.stages()["toy_match_robust"] is toy_stage.STAGE
    assert {"wan", "skyreels_v2"} < set(registry.families())
    assert diffusers.CausalToyTransformer3DModel is CausalToyTransformer3DModel
    assert diffusers.MLAToyTransformer3DModel is MLAToyTransformer3DModel


def test_the_family_may_be_imported_first(installed: Path) -> None:
    """In a fresh process, where importing it starts the import of `mla_convert.families`."""
    code = (
        "import toy_family, diffusers\n"
        "from mla_convert import registry\n"
        "assert registry.families()['toy'] is toy_family.FAMILY\n"
        "assert diffusers.MLAToyTransformer3DModel is toy_family.MLAToyTransformer3DModel"
    )
    path = os.pathsep.join([str(installed), str(TESTS), str(TESTS.parent)])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        ("from toy_family import FAMILY as ITEM", ValueError, "other:ITEM and toy_family:FAMILY both export a FAMILY"),
        ("1 / 0", ZeroDivisionError, "division"),
        ("", AttributeError, "ITEM"),
        ("ITEM = 3", ValueError, "the entry point other:ITEM of mla_convert.families has no name: it is 3"),
        (
            "import dataclasses, toy_family; ITEM = dataclasses.replace(toy_family.FAMILY, name='toys')",
            ValueError,
            "the families toy and toys both read ToyTransformer3DModel",
        ),
        (
            "import dataclasses, toy_family; ITEM = dataclasses.replace(toy_family.FAMILY, name='toys', "
            "mla_class=type('MLAWanTransformer3DModel', (), {}))",
            ValueError,
            "family toys: mla_convert.families.wan already has a class MLAWanTransformer3DModel; rename yours",
        ),
    ],
    ids=["same-name", "broken", "absent", "nameless", "same-source", "same-class"],
)
def test_a_bad_package_is_loud(
    module: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = install(tmp_path, "[mla_convert.families]\nother = other:ITEM\n") / "toy-1.0.dist-info"
    info.rename(tmp_path / "other-1.0.dist-info")
    (tmp_path / "other-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (tmp_path / "other.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other", raising=False)
    registry.collect.cache_clear()
    try:
        with pytest.raises(error, match=message):
            registry.families()
    finally:
        registry.collect.cache_clear()


def dense_model(heads: int = HEADS, **changes: Any) -> Any:
    return pico.dense_model(heads, family="toy", **changes)


def stock_copy(dense: Any) -> ToyTransformer3DModel:
    settings = {k: v for k, v in dense.config.items() if not k.startswith("_") and k != "causal"}
    stock = ToyTransformer3DModel(**settings).eval().requires_grad_(False)
    stock.load_state_dict(dense.state_dict())
    return stock


def lossless(own_chunk: str) -> list[dict[str, Any]]:
    """`pico.lossless` with the toy's rotary pairs, of which a third rotate with time."""
    *others, baked = pico.lossless(HEADS, 12, own_chunk)
    temporal = HEADS * 12 // 3
    return [*others, baked | {"kv_lora_rank": 2 * HEADS * 12 - temporal, "qk_rope_head_dim": temporal}]


def test_the_parameters_are_those_of_the_stock_model() -> None:
    dense = dense_model()
    stock = stock_copy(dense)
    assert list(dense.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in dense.named_parameters()] == [name for name, _ in stock.named_parameters()]


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 18), (2, 12)])
def test_one_chunk_equals_the_stock_forward(heads: int, head_dim: int) -> None:
    dense = dense_model(heads, head_dim=head_dim, causal={"num_frames_per_block": 5, "window_frames": 5})
    latents, _, text = pico.inputs(2, 5, 6, 10)
    timestep, motion = torch.tensor([250.0, 800.0]), torch.tensor([0, 3])
    expected = stock_copy(dense)(latents, timestep, text, motion).sample
    assert pico.relative_error(dense(latents, timestep, text, motion=motion).sample, expected) < FLOAT32
    assert pico.relative_error(dense(latents, timestep, text).sample, expected) > 1e-2


@pytest.mark.parametrize("own_chunk", ["exact", "latent"])
@pytest.mark.parametrize("case", range(4), ids=["rotate_on_read", "derived", "decoupled", "baked"])
def test_full_rank_loses_nothing(case: int, own_chunk: str) -> None:
    dense = dense_model()
    model = pico.convert(dense, **lossless(own_chunk)[case])
    clip, motion = pico.inputs(2, 11, 6, 4), torch.tensor([1, 2])
    expected = dense(*clip, motion=motion).sample
    assert pico.relative_error(model(*clip, motion=motion).sample, expected) < FLOAT32
    assert pico.relative_error(pico.stream(model, *clip, motion=motion)[0], expected) < FLOAT32


@pytest.mark.parametrize("variant", [None, *pico.VARIANTS], ids=lambda v: v and f"{v['position']}-{v['own_chunk']}")
def test_streaming_equals_the_whole_clip_and_caches_what_it_says(variant: dict[str, Any] | None) -> None:
    dense = dense_model()
    model = dense if variant is None else pico.convert(dense, **variant)
    clip, motion = pico.inputs(2, 13, 6, 4), torch.tensor([1, 2])
    streamed, cache = pico.stream(model, *clip, motion=motion)
    assert pico.relative_error(streamed, model(*clip, motion=motion).sample) < FLOAT32
    assert cache.scalars_per_token() == (2 * HEADS * 12 if variant is None else 20)


def test_teacher_forcing_equals_chunk_by_chunk() -> None:
    dense, motion = dense_model(), torch.tensor([1, 2])
    clean, _, text = pico.inputs(2, 4, 6, 4)
    noisy, timestep, _ = pico.inputs(2, 4, 6, 4, seed=3)
    packed = dense(noisy, timestep, text, context=clean, motion=motion).sample
    cache = dense.init_cache(2, 6, 4)
    dense.forward_chunk(clean[:, :, :2], torch.zeros(2), text, cache, write=True, motion=motion)
    last = dense.forward_chunk(noisy[:, :, 2:], timestep[:, 2:], text, cache, motion=motion)
    assert pico.relative_error(last, packed[:, :, 2:]) < FLOAT32


@pytest.mark.parametrize("position", ["rotate_on_read", "derived", "decoupled", "baked"])
def test_the_error_falls_with_the_rank(position: str) -> None:
    dense = dense_model(2)
    clip = pico.inputs(4, 8, 6, 4, seed=10)
    expected = dense(*clip).sample
    shared = {} if position == "rotate_on_read" else {"qk_rope_head_dim": 4}
    errors = []
    for rank in (2, 18, 36):
        model = pico.convert(dense, position=position, kv_lora_rank=rank, own_chunk="exact", **shared)
        errors.append(float((model(*clip).sample - expected).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def write_stock(folder: Path) -> ToyTransformer3DModel:
    stock = stock_copy(dense_model(2))
    stock.save_pretrained(folder)
    return stock


def test_a_stock_folder_is_loaded_converted_saved_and_loaded(tmp_path: Path) -> None:
    stock = write_stock(tmp_path / "stock")
    source = load_source(str(tmp_path / "stock"), causal={"num_frames_per_block": 5, "window_frames": 5})
    assert source.family is FAMILY
    assert source.geometry.dense_scalars_per_token == 48
    settings = {"kv_lora_rank": 12, "own_chunk": "latent", "calibration": {"clips": 8, "batch_size": 4}}
    model = convert_model(FAMILY, load_dense(source), ConvertConfig(**settings), pico.batches())
    model.save_pretrained(tmp_path / "mla")
    again = MLAToyTransformer3DModel.from_pretrained(tmp_path / "mla").eval()
    assert again.config.motion_levels == 4
    latents, _, text = pico.inputs(1, 5, 6, 4)
    clip = (latents, torch.tensor([400.0]), text)
    assert torch.equal(again(*clip).sample, model(*clip).sample)
    assert 1e-4 < pico.relative_error(model(*clip).sample, stock(*clip).sample) < 0.5


def publish(folder: Path, **extra: Tensor) -> str:
    """The weights as the toy's research repository would publish them, without a configuration."""
    write_stock(folder)
    (folder / CONFIG).unlink()
    tensors = load_file(folder / WEIGHTS)
    named = {f"model.{name.replace('blocks.', 'layers.', 1)}": tensor for name, tensor in tensors.items()}
    save_file(named | extra, folder / "published.safetensors")
    return str(folder / "published.safetensors")


def test_the_published_layout_is_read(tmp_path: Path) -> None:
    source = load_source(publish(tmp_path / "stock"))
    assert source.family is FAMILY
    assert (source.config["motion_levels"], source.config["num_attention_heads"]) == (4, 2)
    assert load_dense(source).causal.window_frames == 16


def test_near_misses_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="control branch is not part of the causal model"):
        load_source(publish(tmp_path / "file", **{"model.control_in.weight": torch.zeros(2)}))
    write_stock(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / CONFIG).read_text())
    (tmp_path / "folder" / CONFIG).write_text(json.dumps(config | {"_class_name": "ToyControlTransformer3DModel"}))
    with pytest.raises(UserError, match=r"ToyControlTransformer3DModel: its control branch .* are .*ToyTransformer3D"):
        load_source(str(tmp_path / "folder"))
    (tmp_path / "folder" / CONFIG).write_text(json.dumps(config | {"attention_head_dim": 8, "num_attention_heads": 3}))
    with pytest.raises(UserError, match="attention_head_dim=8 is not a multiple of 6"):
        load_source(str(tmp_path / "folder"))


def test_a_recipe_runs_on_it_with_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_stock(tmp_path / "source" / "transformer")
    latents, _, text = pico.inputs(6, 4, 4, 4)
    write_latents(tmp_path / "data", [Clip(clip, prompt) for clip, prompt in zip(latents, text, strict=True)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(source=tmp_path / "source", data=tmp_path / "data"))
    assert main(["run", str(recipe), "--out", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["dense_scalars_per_token"], result["latent_scalars_per_token"]) == (48, 8)
    logged = [json.loads(line) for line in next((tmp_path / "run").rglob("metrics.jsonl")).read_text().splitlines()]
    assert any("largest_error" in json.dumps(entry) for entry in logged)
    folder = tmp_path / "run" / "checkpoint" / "transformer"
    model = diffusers.MLAToyTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16)
    clip = (latents[:1].bfloat16(), torch.tensor([400.0]), text[:1].bfloat16())
    assert model(*clip).sample.isfinite().all()
    assert toy_family.FAMILY.mla_class is type(model)
