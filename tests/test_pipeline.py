"""A run does its steps in order, once each, and survives being killed."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import diffusers
import mla_attention
import pytest
import torch
import warm
from recipe_case import RECIPE, digests, run_recipe, write_teacher
from rich.console import Console

from mla_convert.distill.footprint import Launch
from mla_convert.distill.trainer import BOOKKEEPING
from mla_convert.errors import UsageError, UserError
from mla_convert.export.checkpoint import load_checkpoint
from mla_convert.export.manifest import read_manifest, verify_files
from mla_convert.export.same_run import LATE
from mla_convert.files import write_json
from mla_convert.load import LazyTensors
from mla_convert.pipeline import run
from mla_convert.pipeline import rundir as rundir_module
from mla_convert.pipeline import steps as steps_module
from mla_convert.pipeline.checks import check_recipe
from mla_convert.pipeline.context import Context
from mla_convert.pipeline.dry_run import dry_run
from mla_convert.pipeline.rundir import RunDir, read_state
from mla_convert.pipeline.summary import build_report
from mla_convert.recipe.load import parse_recipe

run_module = importlib.import_module("mla_convert.pipeline.run")
STEPS = ["convert", "distill 01-match_velocity", "evaluate", "export", "samples", "report"]
ROLLOUTS = "data={kind: rollouts, heldout: 2, rollouts: {clips: 4, num_frames: 3, prompts: ['7']}}"
# What a run makes, in this order; the moment each appears is a moment to be killed at.
MILESTONES = [
    "state.json",
    "stages/00-convert",
    "training/01-match_velocity/checkpoints/step-00000002",
    "training/01-match_velocity/checkpoints/step-00000006",
    "stages/01-match_velocity",
    "stages/01-match_velocity/report.json",
    "checkpoint",
    "samples",
    "metrics.jsonl",
    "report.json",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def recipe(teacher: Path, *overrides: str):
    return parse_recipe(RECIPE.format(teacher=teacher), overrides)


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(recipe(teacher), folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run that a test can change."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def state(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())


def test_run_folder_has_what_the_contract_says(finished):
    names = {path.name for path in finished.iterdir()}
    files = {"recipe.resolved.yaml", "state.json", "metrics.jsonl", "report.json", "report.html"}
    assert names == files | {"checkpoint", "samples", "stages", "training"}
    assert list(state(finished)["steps"]) == STEPS
    assert state(finished)["finished"]
    assert {path.suffix for path in (finished / "samples").iterdir()} == {".mp4", ".safetensors"}
    assert not list(finished.rglob("*.tmp"))
    assert not list(finished.glob("training/*/checkpoints"))


def test_resolved_recipe_gives_the_same_recipe(teacher, finished):
    assert parse_recipe((finished / "recipe.resolved.yaml").read_text()) == recipe(teacher)


def test_checkpoint_is_a_diffusers_model_with_its_manifest(teacher, finished):
    folder = finished / "checkpoint"
    manifest = read_manifest(folder)

    verify_files(folder, manifest, folder / "transformer")
    model = diffusers.MLAWanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)

    assert model.mla.kv_lora_rank == (8, 8)
    assert manifest["prompt_encoder"] == "digits"
    assert manifest["source"]["model"] == str(teacher)
    assert manifest["recipe"] == recipe(teacher).model_dump(mode="json")
    assert "Measured" in (folder / "README.md").read_text()


def test_report_has_the_contracts_keys(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["dense_scalars_per_token"] == 48
    assert report["latent_scalars_per_token"] == 8
    assert report["reduction"] == pytest.approx(1 - 8 / 48)
    assert report["dense_cache_bytes"] == 6 * report["latent_cache_bytes"]
    assert {"teacher_loss", "converted_loss", "student_loss", "loss_increase"} <= report.keys()
    assert len(report["attention_rel_error"]) == 2
    assert report["accuracy"].keys() == {"teacher", "student"}
    assert {name: chosen["mode"] for name, chosen in report["kernels"].items()} == {
        "teacher": "auto",
        "student": "auto",
    }
    assert all(chosen["paths"] == {"torch": 2} for chosen in report["kernels"].values())
    assert set(report["seconds"]) == {*STEPS[:-1], "total"}
    assert [row["step"] for row in report["curves"]] == list(range(7))
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert rows == report["curves"]


def test_the_report_reads_no_weights(teacher, finished, monkeypatch):
    monkeypatch.setattr(LazyTensors, "__getitem__", lambda self, name: pytest.fail("a tensor is read"))
    report = build_report(Context(recipe(teacher), finished, lambda *told: None))
    written = json.loads((finished / "report.json").read_text())
    assert report["plan"] == written["plan"] and report["plan"]["dtype"] == "bfloat16"


def test_checkpoint_holds_no_time_and_no_place(finished):
    for path in (finished / "checkpoint").rglob("*"):
        if path.suffix in (".json", ".md"):
            text = path.read_text()
            assert "seconds" not in text
            assert str(finished) not in text


def test_run_again_says_that_it_is_finished(teacher, finished):
    with pytest.raises(UserError, match=r"is finished; --resume shows its result, or give another --out"):
        run(recipe(teacher), finished)


def test_resume_of_a_finished_run_changes_nothing(teacher, copied):
    before = digests(copied)
    run(recipe(teacher), copied, resume=True)
    assert digests(copied) == before


def test_another_recipe_is_refused_by_the_key_that_differs(teacher, copied):
    before = digests(copied)
    with pytest.raises(UsageError, match=r"another recipe: distill\.0\.learning_rate was 0\.001 .* and is now 0\.002"):
        run(recipe(teacher, "distill.0.learning_rate=2e-3"), copied, resume=True)
    with pytest.raises(
        UsageError, match=r"generate\.fps was 4 .* now 8 .*, or change it with export, evaluate or generate on"
    ):
        run(recipe(teacher, "generate.fps=8"), copied, resume=True)
    assert digests(copied) == before


@pytest.mark.parametrize("gone", [True, False])
def test_a_recipe_of_another_version_is_named_as_that(teacher, copied, gone):
    """Its keys differ from this version's; a recorded recipe has all keys of its version."""
    content = state(copied)
    stage = content["recipe"]["distill"][0]
    if gone:
        del stage["batch_size"]
    else:
        stage["flavour"] = 3
    write_json(copied / "state.json", content)
    what = r"do not have the key distill\.0\.batch_size" if gone else r"have the key distill\.0\.flavour"
    with pytest.raises(
        UsageError, match=rf"begun by another version of mla-convert, whose recipes {what}; continue with"
    ):
        run(recipe(teacher), copied, resume=True)


def stopped(finished: Path, folder: Path, steps: list[str]) -> Path:
    """A copy of a run as it was after only `steps`."""
    shutil.copytree(finished, folder)
    content = state(folder)
    content["steps"] = {name: content["steps"][name] for name in steps}
    write_json(folder / "state.json", content | {"finished": False})
    return folder


def test_what_no_step_has_read_may_change(teacher, finished, tmp_path):
    """Bookkeeping can change at any time, a late section until its step is done; the checkpoint has the change too."""
    folder, said = stopped(finished, tmp_path / "run", STEPS[:4]), io.StringIO()
    changed = recipe(teacher, "generate.fps=8", "distill.0.checkpoint_every=3", "distill.0.tracker=[tensorboard]")
    run(changed, folder, resume=True, console=Console(file=said))
    assert said.getvalue().splitlines()[0] == (
        "the recipe has changed since the run began: distill.0.checkpoint_every was 2 (an integer) and is now 3 "
        '(an integer); distill.0.tracker was nothing (null) and is now ["tensorboard"] (a list); '
        "generate.fps was 4 (an integer) and is now 8 (an integer)"
    )
    assert parse_recipe((folder / "recipe.resolved.yaml").read_text()) == changed
    assert state(folder)["recipe"] == changed.model_dump(mode="json")
    assert state(folder)["recipe_sha256"] == changed.sha256()
    assert read_manifest(folder / "checkpoint")["recipe"] == changed.model_dump(mode="json")
    assert parse_recipe(json.loads((folder / "report.json").read_text())["recipe"]) == changed
    assert digests(folder / "stages") == digests(finished / "stages")


def test_the_documentation_names_all_bookkeeping():
    text = (Path(__file__).parents[1] / "docs" / "distill.md").read_text(encoding="utf-8")
    _, _, behind = text.partition("A resumed run may change these recipe keys:\n\n")
    listed, _, _ = behind.partition("\n\n")
    assert [key for key in (*BOOKKEEPING, *LATE) if f"`{key}`" not in listed] == []


@pytest.mark.parametrize(
    ("done", "override", "key"),
    [
        (1, "evaluate.clips=2", "evaluate.clips"),
        (3, "evaluate.batch_size=1", "evaluate.batch_size"),
        (4, "export.dtype=float32", "export.dtype"),
        (5, "generate.fps=8", "generate.fps"),
        (1, "distill.0.batch_size=1", "distill.0.batch_size"),
        (1, "distill=[]", "distill"),
        (1, "seed=1", "seed"),
    ],
)
def test_what_a_step_has_read_may_not_change(teacher, finished, tmp_path, done, override, key):
    folder = stopped(finished, tmp_path / "run", STEPS[:done])
    before = digests(folder)
    with pytest.raises(UsageError, match=rf"has another recipe: {key} was .* and is now .*; give another --out"):
        run(recipe(teacher, override), folder, resume=True)
    assert digests(folder) == before


def test_clips_that_were_calibrated_on_were_made_by_generate(teacher, finished, tmp_path):
    """With `convert.calibration.source: rollouts` in the recorded recipe."""
    folder = stopped(finished, tmp_path / "run", STEPS[:1])
    content = state(folder)
    content["recipe"]["convert"]["calibration"]["source"] = "rollouts"
    write_json(folder / "state.json", content)
    with pytest.raises(UsageError, match=r"another recipe: generate\.fps"):
        run(recipe(teacher, "convert.calibration.source=rollouts", "generate.fps=8"), folder, resume=True)


@pytest.mark.parametrize(
    ("damaged", "redone"),
    [
        ("checkpoint/transformer/config.json", ["export", "samples", "report"]),
        ("report.html", ["report"]),
    ],
)
def test_changed_output_is_made_again(teacher, finished, copied, damaged, redone):
    (copied / damaged).write_text("{}")
    ended = {name: step["ended"] for name, step in state(copied)["steps"].items()}
    before = digests(copied)
    folder = RunDir(copied, recipe(teacher), resume=True)
    try:
        assert folder.verify(STEPS) == redone[0]
        assert [step for step in ended if not folder.is_done(step)] == redone
    finally:
        folder.close()
    # Nothing is written before `begin`.
    assert digests(copied) == before

    run(recipe(teacher), copied, resume=True)

    assert digests(copied / "checkpoint") == digests(finished / "checkpoint")
    assert state(copied)["finished"]


def test_a_file_that_no_step_wrote_is_left_alone(teacher, copied):
    """It is no reason to train again, and is not removed with a damaged file beside it."""
    notes = [copied / "stages" / "00-convert" / "transformer" / name for name in ("notes.txt", ".nfs0001")]
    notes.append(copied / "samples" / "mine.txt")
    for note in notes:
        note.write_text("mine")
    before, said = digests(copied), io.StringIO()
    run(recipe(teacher), copied, resume=True, console=Console(file=said))
    assert digests(copied) == before and said.getvalue() == ""

    spoilt = next((copied / "stages" / "00-convert" / "transformer").glob("*.safetensors"))
    spoilt.write_bytes(b"")
    folder = RunDir(copied, recipe(teacher), resume=True)
    try:
        assert folder.verify(STEPS) == "convert"
        folder.begin()
    finally:
        folder.close()
    assert not spoilt.exists() and all(note.read_text() == "mine" for note in notes)


def test_parts_of_a_run_make_the_whole(teacher, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    converted = run(recipe(teacher), folder, resume=True, until="convert")
    assert f"nothing to resume in {folder}; starting the run\n" in capsys.readouterr().err
    assert list(state(folder)["steps"]) == STEPS[:1]
    assert converted.model == folder / "stages" / "00-convert"
    load_checkpoint(converted.model)

    with pytest.raises(UserError, match="was started before; continue it with --resume"):
        run(recipe(teacher), folder, until="distill")
    run(recipe(teacher), folder, resume=True, until="distill")
    assert "resuming: step distill 01-match_velocity\n" in capsys.readouterr().err
    assert list(state(folder)["steps"]) == STEPS[:2]
    assert not state(folder)["finished"]

    run(recipe(teacher), folder, resume=True)
    assert digests(folder / "checkpoint") == digests(finished / "checkpoint")
    again, before = (json.loads((path / "report.json").read_text()) for path in (folder, finished))
    # Two runs with one seed say the same, but for how long they took.
    assert {**again, "seconds": None} == {**before, "seconds": None}
    assert "seed: 0" in before["recipe"] and {"torch", "diffusers", "mla_convert"} <= before["versions"].keys()


@pytest.mark.parametrize("data", ["data.kind=digits", ROLLOUTS])
def test_without_stages_the_conversion_is_what_is_distilled(teacher, data):
    """`distill` creates it, after the clips that a run generates itself."""
    steps = [step.name for step in run_module.steps_until(recipe(teacher, data, "distill=[]"), "distill")]
    assert steps == (["data", "convert"] if data == ROLLOUTS else ["convert"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generate.prompts=[hello]", r"generate\.prompts: cannot read the digits prompt 'hello'"),
        ("source.model=/nowhere", r"/nowhere does not exist"),
        ("generate.start=nope.png", r"generate\.start: nope\.png does not exist"),
        ("generate.source=nope.mp4", r"generate\.source: nope\.mp4 does not exist"),
        ("generate.latent_height=17", r"generate\.latent_height and latent_width: a latent of 17x16 does not divide"),
        ("causal.window_frames=null", r"causal\.window_frames: null has no streaming cache"),
        ("streaming.kernels=triton", r"streaming\.kernels: triton: .*; set auto"),
        ("distill.0.compile_backend=foo", r"compile_backend: torch has no 'foo'; choose one of .*inductor"),
        (
            "distill.0.lora={rank: 2, alpha: 2, target_modules: [nope]}",
            r"distill\.0: lora\.target_modules: no frozen linear layer .* nope",
        ),
    ],
)
def test_what_cannot_work_leaves_no_folder(teacher, tmp_path, monkeypatch, override, message):
    # The interpreter would take what a CPU does not.
    monkeypatch.setattr(mla_attention, "why_not", lambda device, dtype: f"kernels run on CUDA devices, not on {device}")
    with pytest.raises(UserError, match=message):
        run(recipe(teacher, override, "distill.0.compile=true"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_video_longer_than_the_rotary_table_leaves_no_folder(teacher, tmp_path):
    changes = ["causal={sink_positions: absolute}", "generate.num_frames=1025"]
    with pytest.raises(UsageError, match=r"generate\.num_frames: 1025 latent frames are more than .* 1024 positions"):
        run(recipe(teacher, *changes), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


IMPOSSIBLE = [
    ("convert.kv_lora_rank=49", r"convert\.kv_lora_rank: 49 in layer 0 is not between 1 and 48"),
    ("convert.kv_lora_rank=[8]", r"convert\.kv_lora_rank: kv_lora_rank lists 1 layers, the model has 2"),
    ("convert.layers_per_latent=3", r"convert\.layers_per_latent: 2 layers cannot share latents 3 at a time; one of"),
    ("convert.q_lora_rank=25", r"convert\.q_lora_rank: 25 is larger than the rank 24"),
    ("convert.budget={scalars_per_token: 4}", r"convert\.budget: 4 scalars per token are less than rank_multiple 16"),
    ("convert={position: derived, qk_rope_head_dim: 26}", r"qk_rope_head_dim: 26 is larger than the 24 .* all heads"),
    ("convert={position: derived, qk_rope_head_dim: 14, init: svd}", r"14 is larger than the 12 .* of a head"),
    ("convert={position: baked, qk_rope_head_dim: 12}", r"qk_rope_head_dim: 12 is larger than the 8 .* all heads"),
]


@pytest.mark.parametrize(("override", "message"), IMPOSSIBLE)
@pytest.mark.parametrize("data", ["data.kind=digits", ROLLOUTS])
def test_impossible_numbers_are_refused_before_anything_is_made(teacher, tmp_path, override, message, data):
    """By the same checks as in `recipes check`."""
    changes = [override, data]
    if "convert=" in override:
        changes.append("convert.kv_lora_rank=8")
    elif "budget" in override:
        changes.append("convert.kv_lora_rank=null")
    with pytest.raises(UsageError, match=message):
        run(recipe(teacher, *changes), tmp_path / "run")
    with pytest.raises(UsageError, match=message):
        check_recipe(recipe(teacher, *changes))
    with pytest.raises(UsageError, match=message):
        dry_run(recipe(teacher, *changes), Launch())
    assert list(tmp_path.iterdir()) == []


def test_failed_step_keeps_what_was_done(teacher, tmp_path, monkeypatch):
    def full(*_):
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(steps_module, "evaluate", full)
        with pytest.raises(UserError, match="the disk is full"):
            run(recipe(teacher), tmp_path / "run")
    assert list(state(tmp_path / "run")["steps"]) == STEPS[:2]


def test_foreign_folder_is_refused(teacher, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a run folder of mla-convert"):
        run(recipe(teacher), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_processes_do_not_share_a_folder(teacher, tmp_path):
    first = RunDir(tmp_path / "run", recipe(teacher), resume=False)
    try:
        message = rf"another process is working in .*run \(process {os.getpid()} on .+\); wait"
        with pytest.raises(UserError, match=message):
            RunDir(tmp_path / "run", recipe(teacher), resume=False)
    finally:
        first.close()


def test_a_state_that_cannot_be_read_for_a_moment_is_waited_for(copied, monkeypatch):
    """As on NFS, where a file that was just replaced may be stale."""
    monkeypatch.setattr(rundir_module, "_RETRY_SECONDS", 0.01)
    moved, read, failures = copied / "moved.json", Path.read_text, [OSError(errno.ESTALE, "Stale file handle")] * 3

    def stale(path, *args, **kwargs):
        if path.name == "state.json" and failures:
            raise failures.pop()
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", stale)
    run_module._wait_until_seen(copied, "report")
    assert not failures
    failures.append(OSError(errno.ESTALE, "Stale file handle"))
    with pytest.raises(UserError, match=r"state\.json cannot be read"):
        read_state(copied)
    (copied / "state.json").rename(moved)
    timer = threading.Timer(0.2, moved.rename, [copied / "state.json"])
    timer.start()
    run_module._wait_until_seen(copied, "report")
    assert (copied / "state.json").exists()
    timer.join()
    moved = (copied / "state.json").rename(moved)
    with pytest.raises(UserError, match=r"is not a run folder: it has no state\.json"):
        read_state(copied, 0.05)


def start(teacher: Path, folder: Path):
    process = warm.server().Process(target=run_recipe, args=(teacher, folder))
    process.start()
    return process


def finish(teacher: Path, folder: Path) -> None:
    process = start(teacher, folder)
    process.join()
    assert process.exitcode == 0, (folder.parent / "stderr.txt").read_text()


def test_killed_at_every_milestone_ends_with_the_same_bytes(teacher, finished, tmp_path):
    folder = tmp_path / "run"
    for milestone in MILESTONES:
        process = start(teacher, folder)
        while not (folder / milestone).exists() and process.is_alive():
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode in (-9, 0), (tmp_path / "stderr.txt").read_text()
    finish(teacher, folder)

    assert digests(folder / "checkpoint") == digests(finished / "checkpoint")
    assert digests(folder / "samples") == digests(finished / "samples")
    assert (folder / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert not list(folder.rglob("*.tmp"))


def test_killed_at_any_moment_ends_with_the_same_bytes(teacher, finished, tmp_path):
    whole = sum(step["seconds"] for step in state(finished)["steps"].values())
    moments = random.Random(0)
    folder = tmp_path / "run"
    killed = 0
    while killed < 6:
        process = start(teacher, folder)
        process.join(timeout=moments.uniform(0, whole / 2))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        killed += 1
    finish(teacher, folder)

    assert killed > 0
    assert digests(folder / "checkpoint") == digests(finished / "checkpoint")
