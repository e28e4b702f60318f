"""The data-free mode: clips that the dense teacher generated, made once and read like any others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from recipe_case import RECIPE, digests, write_teacher
from safetensors.torch import save_file

from mla_convert.distill.clip_shards import Clip, write_shard
from mla_convert.distill.data import DataConfig, drawn_rows, open_data
from mla_convert.distill.latents import LatentShards
from mla_convert.distill.rollouts import RolloutsConfig, open_folder, write_rollouts
from mla_convert.draws import Use, drawn_seed
from mla_convert.errors import UsageError, UserError
from mla_convert.load import load_dense, load_source
from mla_convert.pipeline import evaluation, run
from mla_convert.pipeline import rollouts as pipeline_module
from mla_convert.pipeline.evaluation import evaluate_checkpoint
from mla_convert.pipeline.rollout_texts import TextFiles, digest_of
from mla_convert.recipe.load import parse_recipe
from mla_convert.run.stream import stream_chunks
from mla_convert.zoo.digits.data import parse_prompt

PROMPTS = ["7 moving up", "3 at 1,1 moving left", "0 moving right"]
DATA = (
    "data={kind: rollouts, heldout: 2, rollouts: {clips: 5, num_frames: 6, batch_size: 2, num_inference_steps: 2, "
    "shift: 3.0, guidance_scale: 2.0, prompts: [7 moving up, '3 at 1,1 moving left', 0 moving right]}}"
)


def silent(*told: Any) -> None:
    """A report that nobody reads."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def recipe(teacher: Path, *overrides: str) -> Any:
    return parse_recipe(RECIPE.format(teacher=teacher), [DATA, "distill.0.steps=2", *overrides])


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data-free run up to its last stage."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(recipe(teacher), folder, until="distill")
    return folder


def drawn(text: torch.Tensor, seed: int, conditions: object = None) -> torch.Tensor:
    """Latents that depend only on the seed and the prompts, in place of a rollout."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(text), 1, 2, 3, 4, generator=generator) + text.sum((1, 2)).view(-1, 1, 1, 1, 1)


def written(folder: Path, processes: int = 1, **settings: Any) -> dict[str, str]:
    """Digests of a folder written by `processes` processes, one after the other."""
    config = RolloutsConfig(**{"clips": 5, "batch_size": 2, "prompts": PROMPTS, **settings})
    text = torch.stack([parse_prompt(prompt).embedding() for prompt in PROMPTS])
    open_folder(folder, "same")
    for process in range(processes):
        write_rollouts(folder, config, 0, text, PROMPTS, drawn, silent, process, processes)
    return digests(folder)


def test_folder_is_the_same_for_any_number_of_processes_and_after_an_interruption(tmp_path: Path) -> None:
    whole = written(tmp_path / "one")
    assert sorted(whole) == ["rollouts.json", *(f"shard-0000{number}.parquet" for number in range(3))]
    assert written(tmp_path / "two", processes=2) == whole
    (tmp_path / "one" / "shard-00001.parquet").unlink()
    (tmp_path / "one" / ".shard-00001.parquet.1.tmp").touch()
    kept = (tmp_path / "one" / "shard-00000.parquet").stat().st_mtime_ns
    assert written(tmp_path / "one") == whole
    assert (tmp_path / "one" / "shard-00000.parquet").stat().st_mtime_ns == kept


def test_prompts_are_taken_in_turn_with_noise_of_their_own(tmp_path: Path) -> None:
    written(tmp_path, clips=7)
    shards = LatentShards(tmp_path)
    assert [shards.caption(index) for index in range(7)] == [PROMPTS[index % 3] for index in range(7)]
    assert torch.equal(shards.read(4)["encoder_hidden_states"], parse_prompt(PROMPTS[1]).embedding())
    latents = torch.stack([shards.read(index)["latents"] for index in range(7)])
    assert len(latents.flatten(1).unique(dim=0)) == 7


def test_clips_of_other_settings_are_made_again(tmp_path: Path) -> None:
    written(tmp_path)
    open_folder(tmp_path, "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rollouts.json"]


def test_rollouts_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    config = RolloutsConfig(clips=2, prompts=PROMPTS)
    text = torch.zeros(3, 3, 32)
    with pytest.raises(UserError, match=r"rollout for shard-00000\.parquet has NaN"):
        write_rollouts(tmp_path, config, 0, text, PROMPTS, lambda *given: drawn(*given) * torch.nan, silent)
    assert not list(tmp_path.glob("*.parquet"))


def test_clips_are_the_teachers_and_are_trained_on(teacher: Path, finished: Path) -> None:
    settings = recipe(teacher).data
    data = open_data(settings.made_in(finished / "data"), seed=0)
    assert data.size == 3
    text = torch.stack([parse_prompt(prompt).embedding() for prompt in PROMPTS[:2]])
    dense, seed = load_dense(load_source(str(teacher))), drawn_seed(Use.ROLLOUT, 0, 0)
    chunks = stream_chunks(dense, text, 6, 16, 16, num_inference_steps=2, shift=3.0, guidance_scale=2.0, seed=seed)
    first = data.shards.read(0)
    assert torch.equal(first["latents"], torch.cat(list(chunks), dim=2)[0])
    assert torch.equal(first["encoder_hidden_states"], text[0])
    read = [data.shards.read(row)["latents"] for row in drawn_rows(5, seed=0)]
    assert all(torch.equal(data.example(index)["latents"], read[index]) for index in range(3))
    assert (finished / "stages" / "01-match_velocity" / "transformer").is_dir()


def test_spoilt_clips_are_made_again(teacher: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    whole = digests(finished / "data")
    for number, spoil in enumerate((lambda path: path.write_bytes(b"PAR1"), lambda path: path.unlink())):
        spoil(tmp_path / "run" / "data" / f"shard-0000{number}.parquet")
        kept = (tmp_path / "run" / "data" / "shard-00002.parquet").stat().st_mtime_ns
        run(recipe(teacher), tmp_path / "run", resume=True, until="data")
        assert digests(tmp_path / "run" / "data") == whole
        assert (tmp_path / "run" / "data" / "shard-00002.parquet").stat().st_mtime_ns == kept
        outputs = json.loads((tmp_path / "run" / "state.json").read_text())["steps"]["data"]["outputs"]
        assert outputs == {f"data/{name}": digest for name, digest in whole.items()}


def test_interrupted_run_ends_with_the_same_bytes(teacher: Path, finished: Path, tmp_path: Path) -> None:
    made = pipeline_module.write_rollouts

    def interrupted(folder: Path, config: RolloutsConfig, *rest: Any) -> None:
        made(folder, config.model_copy(update={"clips": 2}), *rest)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_module, "write_rollouts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(teacher), tmp_path / "run", until="distill")
    assert len(list((tmp_path / "run" / "data").glob("*.parquet"))) == 1
    run(recipe(teacher), tmp_path / "run", resume=True, until="distill")
    for part in ("data", "stages"):
        assert digests(tmp_path / "run" / part) == digests(finished / part)


def test_a_checkpoint_is_measured_on_the_clips_of_its_run(teacher: Path, finished: Path, tmp_path: Path) -> None:
    model = finished / "stages" / "01-match_velocity"
    _, report = evaluate_checkpoint(model, None, tmp_path / "report", {}, silent)
    assert report["student_loss"] > 0
    held = open_data(recipe(teacher).data.made_in(finished / "data"), seed=0).heldout_prompts(2)
    assert sorted(clip["prompt"] for clip in report["by_clip"]["worst"]) == sorted(held)


def test_a_dense_checkpoint_is_not_measured(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "load_checkpoint", pytest.fail)
    with pytest.raises(UsageError, match=r"is a dense model, and evaluate compares a converted one with its teacher"):
        evaluate_checkpoint(teacher, str(teacher), tmp_path / "report", {}, silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.rollouts=null", "kind rollouts and the section rollouts go together"),
        ("data.heldout=5", "heldout: 5 leaves none of 5 rollouts to train on"),
        ("data.folder=x", "leave out folder"),
        ("data.text_tokens=3", "text_tokens pads the prompts of clips in rollouts.prompt_embeds"),
        ("data.latents=raw", "kind rollouts reads none; leave it out"),
        ("data.rollouts.prompts=[]", "rollouts need either prompts or prompt_embeds; set exactly one"),
        ("data.rollouts.clipz=3", "unknown key data.rollouts.clipz; did you mean clips?"),
        ("data.rollouts.dtype=float16", "data.rollouts.dtype"),
    ],
)
def test_wrong_section_is_refused(teacher: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe(teacher, override)
    assert message in str(caught.value)


def test_what_cannot_be_rolled_out_is_refused_before_anything_is_written(teacher: Path, tmp_path: Path) -> None:
    pico.dense_model().save_pretrained(tmp_path / "other")
    save_file({"prompt_embeds": torch.zeros(2, 3, 5)}, tmp_path / "narrow.safetensors")
    embeds = ["data.rollouts.prompts=[]", f"data.rollouts.prompt_embeds={tmp_path / 'narrow.safetensors'}"]
    for changes, message in (
        (
            [f"source.model={tmp_path / 'other'}", "generate.prompts=[]"],
            r"data\.rollouts\.prompts: only digits models read prompts without .* set prompt_embeds to its output",
        ),
        (["data.rollouts.prompts=[eleven]"], r"data\.rollouts\.prompts: cannot read the digits prompt 'eleven'"),
        (embeds, r"prompt_embeds in .*narrow\.safetensors has shape \[2, 3, 5\]; \[L, 32\] is expected"),
        (
            ["causal={sink_positions: absolute}", "data.rollouts.num_frames=1025"],
            r"1025 latent frames .* 1024 positions",
        ),
        (["causal={window_frames: null}"], r"causal\.window_frames: null has no streaming cache"),
    ):
        with pytest.raises(UserError, match=message):
            run(recipe(teacher, *changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_prompts_may_be_embeddings(teacher: Path, tmp_path: Path) -> None:
    text = torch.stack([parse_prompt(prompt).embedding() for prompt in PROMPTS])
    (tmp_path / "embeds").mkdir()
    for number, part in enumerate(text.split(2)):
        save_file({"prompt_embeds": part.contiguous()}, tmp_path / "embeds" / f"prompts-{number:05d}.safetensors")
    config = RolloutsConfig(clips=4, prompt_embeds=str(tmp_path / "embeds"))
    data = DataConfig(kind="rollouts", rollouts=config, heldout=1)
    prompts = pipeline_module.read_prompts(data, load_source(str(teacher)))
    assert prompts.text.shape == text.shape and torch.equal(prompts.text[[0, 1, 2]], text)
    assert torch.equal(prompts.text[[2, 0]], text[[2, 0]]) and prompts.captions[2] == ""


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (torch.zeros(2, 3, 32).to(torch.float8_e4m3fn), r"prompt_embeds in .*a\.safetensors is float8_e4m3fn; give fl"),
        (torch.zeros(0, 3, 32), r"a\.safetensors holds no prompts: prompt_embeds has no rows"),
    ],
)
def test_embeddings_that_cannot_be_used_are_one_line(tmp_path: Path, embeds: torch.Tensor, message: str) -> None:
    save_file({"prompt_embeds": embeds}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        TextFiles([tmp_path / "a.safetensors"], 32)


def test_captions_of_clips_of_several_lengths_are_padded(teacher: Path, tmp_path: Path) -> None:
    """Only captions and embeddings are read, so it does not matter whether the latents are raw."""
    width = parse_prompt(PROMPTS[0]).embedding().shape[1]
    clips = [Clip(20 + torch.randn(1, 2, 4, 4), torch.ones(tokens, width), caption=f"{tokens}") for tokens in (2, 3)]
    write_shard(tmp_path / "clips" / "a.parquet", clips)
    for place in (tmp_path / "clips", tmp_path / "clips" / "a.parquet"):
        config = RolloutsConfig(clips=4, prompt_embeds=str(place))
        data = DataConfig(kind="rollouts", rollouts=config, heldout=1, text_tokens=3)
        prompts = pipeline_module.read_prompts(data, load_source(str(teacher)))
        assert prompts.text.shape == (2, 3, width) and prompts.text[[0]][0, 2].abs().max() == 0
        assert [prompts.captions[row] for row in range(2)] == ["2", "3"]
        assert prompts.conditions([0], 2) == prompts.digests() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("negative", [None, torch.randn(4, 6)])
def test_texts_in_files_have_the_digest_of_texts_in_memory(
    tmp_path: Path, dtype: torch.dtype, negative: torch.Tensor | None
) -> None:
    text = torch.randn(130, 4, 6).to(dtype)
    for number, part in enumerate(text.split(50)):
        save_file({"prompt_embeds": part.contiguous()}, tmp_path / f"prompts-{number}.safetensors")
    files = TextFiles(sorted(tmp_path.iterdir()), 6)
    found = digest_of(text, negative)
    assert digest_of(files, negative) == found
    assert files.dtype == dtype and len(files) == 130
    changed = text.clone()
    changed[129, 3, 5] += 1
    for other, beside in ((changed, negative), (text.view(130, 6, 4), negative), (text, torch.ones(4, 6))):
        assert digest_of(other, beside) != found


def test_no_process_holds_the_embeddings_of_all_prompts(tmp_path: Path) -> None:
    asked = []

    class Rows:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, rows: list[int]) -> torch.Tensor:
            asked.append(rows)
            return torch.ones(len(rows), 3, 32)

    config = RolloutsConfig(clips=7, batch_size=2, prompts=PROMPTS)
    write_rollouts(tmp_path, config, 0, Rows(), [""] * 5, drawn, silent, 1, 2)
    assert asked == [[2, 3], [1]]
