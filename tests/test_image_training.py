"""Image-to-video models are calibrated, trained and measured on the same conditions as in generation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import distill_case
import image_case as case
import pico
import pytest
import torch
from safetensors.torch import save_file
from test_image_data import made
from torch import Tensor

from mla_convert.cli import main
from mla_convert.convert import ConvertConfig, clip_batches, convert_model
from mla_convert.distill.clip_shards import Clip, write_latents
from mla_convert.distill.data import DataConfig, open_data
from mla_convert.distill.latents import LatentShards
from mla_convert.distill.objective import NoisedClips, flow_loss, noised_clips, predict_velocity
from mla_convert.distill.rollout import self_rollout
from mla_convert.distill.trainer import run_stage
from mla_convert.draws import Use, drawn_seed
from mla_convert.errors import UserError
from mla_convert.evaluate.fidelity import fidelity
from mla_convert.export.manifest import family_of
from mla_convert.flow import sampling_times
from mla_convert.registry import stages
from mla_convert.run.stream import stream_chunks

FRAMES, SIZE = 8, (4, 6)
# Over the largest value; the largest error seen on a CPU stands beside it.
FLOAT32 = 1e-5  # 3.3e-7
NAMES = {"wan2.1": ("image_latents", "encoder_hidden_states_image"), "wan2.2": ("image_latents",)}
STAGES: dict[str, dict[str, Any]] = {
    "match_attention": {},
    "match_velocity": {"copies": 2},
    "teacher_forcing": {"context_noise": 0.2},
    "consistency": {"guidance_scale": 2.0, "solver_steps": 4},
    "dmd": {"denoising_steps": (1000, 500)},
}


def batch(kind: str, count: int = 2) -> dict[str, Tensor]:
    """Clips with the inputs of a model of this kind."""
    clips = list(made(count, FRAMES))
    found = {
        "latents": torch.stack([clip.latents for clip in clips]),
        "encoder_hidden_states": case.text(kind, count),
    }
    return found | {name: torch.stack([clip.conditions[name] for clip in clips]) for name in NAMES[kind]}


def changed(given: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {**given, name: given[name] + torch.linspace(-3, 3, given[name].numel()).view_as(given[name])}


def noised(kind: str, model: Any, **settings: Any) -> NoisedClips:
    given = batch(kind)
    latents, text = (given.pop(name) for name in ("latents", "encoder_hidden_states"))
    generator = torch.Generator().manual_seed(0)
    return noised_clips(latents, text, model.causal, generator, conditions=given, **settings)


@torch.no_grad()
def streamed(model: Any, clips: NoisedClips, item: int) -> Tensor:
    """The velocity of one item chunk by chunk, with a cache of clean chunks and the conditions of each chunk."""
    assert clips.context is not None and clips.t_context is not None
    own = {name: x[item : item + 1] for name, x in clips.conditions.items()}
    source = item % len(clips.context)
    text, cache, found = clips.text[item : item + 1], model.init_cache(1, *SIZE), []
    for first, stop in model.causal.chunks(FRAMES):
        now = {**own, "image_latents": own["image_latents"][:, :, first:stop]}
        x, context = (x[:, :, first:stop] for x in (clips.x_t[item : item + 1], clips.context[source : source + 1]))
        found.append(model.forward_chunk(x, 1000 * clips.t[item : item + 1, first:stop], text, cache, **now))
        model.forward_chunk(context, 1000 * clips.t_context[source : source + 1], text, cache, write=True, **now)
    return torch.cat(found, dim=2)


@pytest.mark.parametrize("kind", case.KINDS)
def test_the_forward_of_training_is_that_of_generation(kind: str) -> None:
    for model in (case.model(kind), case.converted(case.model(kind))):
        clips = noised(kind, model, copies=2, context_noise=0.3)
        with torch.no_grad():
            velocity = predict_velocity(model, clips)
        for item in range(4):
            assert pico.relative_error(velocity[item : item + 1], streamed(model, clips, item)) < FLOAT32
        parts = torch.cat([predict_velocity(model, part) for part in noised(kind, model, clean_history=False).split(1)])
        whole = predict_velocity(model, noised(kind, model, clean_history=False))
        assert pico.relative_error(parts, whole) < FLOAT32


def loss_of(stage: str, kind: str, given: dict[str, Tensor], teacher: Any, student: Any) -> float:
    config = distill_case.make_config(stage, **STAGES[stage])
    models = {"student": student, "teacher": teacher, "average": teacher, "fake_score": case.model(kind, seed=5)}
    built = stages()[stage](config)
    loss, _ = built.loss(models, given, torch.Generator().manual_seed(3))
    return loss.item()


@pytest.mark.parametrize("kind", case.KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_reads_every_condition(stage: str, kind: str) -> None:
    teacher, given = case.model(kind), batch(kind)
    student = case.converted(teacher).requires_grad_(True)
    loss = loss_of(stage, kind, given, teacher, student)
    for name in NAMES[kind]:
        assert abs(loss_of(stage, kind, changed(given, name), teacher, student) / loss - 1) > 1e-4
    if stage.startswith("match"):
        own = case.model(kind).requires_grad_(True)
        assert loss_of(stage, kind, given, teacher, own) == 0


def test_the_second_network_reads_them_too() -> None:
    stage = stages()["dmd"](distill_case.make_config("dmd", **STAGES["dmd"], rollout_frames=6))
    models = {"student": case.model(), "fake_score": case.model(seed=5).requires_grad_(True)}
    losses = []
    for given in (batch("wan2.1"), changed(batch("wan2.1"), "image_latents")):
        second = stage.second_batch(models, given, torch.Generator().manual_seed(1))
        # The rollout is shorter than the clip whose images it reads.
        assert second["latents"].shape[2] == 6 and second["image_latents"].shape[2] == FRAMES
        second["latents"] = batch("wan2.1")["latents"][:, :, :6]
        losses.append(stage.second_loss(models, second, torch.Generator().manual_seed(2))[0].item())
    assert abs(losses[1] / losses[0] - 1) > 1e-4


@pytest.mark.parametrize("kind", case.KINDS)
def test_the_rollout_of_training_is_that_of_inference(kind: str) -> None:
    model, given = case.model(kind).requires_grad_(True), batch(kind)
    text = given["encoder_hidden_states"]
    told = {name: given[name] for name in NAMES[kind]}
    times = sampling_times(3, 5.0)
    video = self_rollout(model, text, (7, *SIZE), times, 2, torch.Generator().manual_seed(7), conditions=told)
    expected = torch.cat(list(stream_chunks(model, text, 7, *SIZE, 3, 5.0, seed=7, conditions=told)), dim=2)
    # Observed: 0.
    torch.testing.assert_close(video.detach(), expected, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="image_latents has 8 frames, 10 are needed"):
        self_rollout(model, text, (10, *SIZE), times, 2, torch.Generator(), conditions=told)


@pytest.mark.parametrize("kind", case.KINDS)
def test_what_is_measured_depends_on_them(kind: str) -> None:
    teacher, given = case.model(kind), batch(kind, 3)
    student = case.converted(teacher)
    loss = flow_loss(teacher, given, batch_size=2)
    # Observed: 7e-8.
    assert flow_loss(teacher, given, batch_size=2, forward_size=1) == pytest.approx(loss, rel=1e-6)
    found = fidelity(student, teacher, given, 2, seed=1)
    assert found["teacher_loss"] == pytest.approx(loss, rel=1e-5) and found["velocity_rel_error"] > 1e-3
    for name in NAMES[kind]:
        assert abs(flow_loss(teacher, changed(given, name), batch_size=2) / loss - 1) > 1e-4
        assert fidelity(student, teacher, changed(given, name), 2, seed=1)["teacher_loss"] != found["teacher_loss"]


@pytest.mark.parametrize("kind", case.KINDS)
@pytest.mark.parametrize("metric", ["output", "velocity"])
def test_calibration_runs_the_model_on_its_images(kind: str, metric: str) -> None:
    dense, given = case.model(kind), batch(kind, 4)

    def converted(clips: dict[str, Tensor], **layout: Any) -> Any:
        batches = clip_batches(lambda index: {name: x[index] for name, x in clips.items()}, range(4), 2)
        config = ConvertConfig(calibration=pico.calibration(clips=4, batch_size=2, metric=metric), **layout)
        return convert_model(family_of(type(dense)), dense, config, batches)

    clips = noised(kind, dense)
    with torch.no_grad():
        expected = predict_velocity(dense, clips)
        whole = predict_velocity(converted(given, **pico.lossless(2, 12, "exact")[0]), clips)
        layout = {"position": "rotate_on_read", "kv_lora_rank": 20}
        mine, other = (
            predict_velocity(converted(x, **layout), clips) for x in (given, changed(given, "image_latents"))
        )
    # Observed: 2.9e-7, and 2.8e-3 or more.
    assert pico.relative_error(whole, expected) < FLOAT32
    assert pico.relative_error(mine, other) > 1e-4


def test_a_stage_is_refused_data_without_them(tmp_path: Path) -> None:
    teacher = case.model("wan2.2")
    write_latents(tmp_path / "data", made(4))
    data = open_data(DataConfig(kind="latents", folder=str(tmp_path / "data"), heldout=1), 0)
    config = distill_case.make_config(steps=1)
    with pytest.raises(UserError, match="conditioned on image_latents, which the clips do not hold; pass these"):
        run_stage(config, case.converted(teacher), {"teacher": teacher}, data, None, tmp_path / "work", 0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in `wan2.1` and `wan2.2`, and clips with the first one's inputs in `data`."""
    folder = tmp_path_factory.mktemp("run")
    for kind in case.KINDS:
        case.model(kind).save_pretrained(folder / kind)
    write_latents(folder / "data", made(8), clips_per_shard=4)
    save_file({"prompt_embeds": torch.zeros(1, 512, 8)}, folder / "data" / "negative.safetensors")
    return folder


def recipe(folder: Path, kind: str = "wan2.1", **sections: Any) -> Any:
    common = {"steps": 1, "learning_rate": 1e-3, "batch_size": 2, "tracker": None}
    few = {"sampler": "renoise", "denoising_steps": [1000, 500]}
    distill = [{"stage": name, **common, **settings} for name, settings in STAGES.items()]
    distill[3] |= {"ema_decay": 0.9}
    distill[1] |= {"preview": {"every": 1, "clips": 1, "num_frames": 6, **few}}
    distill[4] |= {"critic_updates": 1, "rollout_frames": 6}
    return {
        "version": 1,
        "name": "i2v",
        "source": {"model": str(folder / kind)},
        "data": {"kind": "latents", "folder": str(folder / "data"), "heldout": 2},
        "convert": {"kv_lora_rank": 20, "position": "rotate_on_read", "calibration": {"clips": 4, "batch_size": 2}},
        "distill": distill,
        "evaluate": {"clips": 2, "batch_size": 2},
        **sections,
    }


def saved(path: Path, given: Any) -> Path:
    path.write_text(json.dumps(given))
    return path


@pytest.mark.parametrize("kind", case.KINDS)
def test_a_run_of_all_stages(kind: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    given = recipe(folder, kind)
    if kind == "wan2.2":
        # The teacher makes the clips to calibrate on from their images.
        given["convert"]["calibration"] |= {"source": "rollouts"}
        given["generate"] = {"num_inference_steps": 1}
    path = saved(tmp_path / "recipe.yaml", given)
    assert main(["run", str(path), "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["curves"]) == 2 * len(STAGES)
    assert all(0 < row["heldout_loss"] < 10 for row in report["curves"])
    assert 0 < report["velocity_rel_error"] < 1
    assert len(list((tmp_path / "run" / "training").rglob("*.png"))) == 1
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run" / "checkpoint"), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    # Observed no difference.
    assert measured["student_loss"] == pytest.approx(report["student_loss"], rel=1e-6)
    assert main(["inspect", str(folder / kind), "--data", str(folder / "data"), "--out", str(tmp_path / "i")]) == 0
    assert main(["distill", str(path), "--dry-run", "--measure", "1", "--json"]) == 0


ROLLOUTS = {"clips": 6, "num_frames": 5, "batch_size": 2, "num_inference_steps": 2, "latent_height": 4}


def test_the_teacher_makes_clips_from_the_images_of_others(folder: Path, tmp_path: Path, capsys: Any) -> None:
    rollouts = {**ROLLOUTS, "prompt_embeds": str(folder / "data"), "latent_width": 6}
    given = recipe(folder, data={"kind": "rollouts", "heldout": 2, "rollouts": rollouts})
    given["distill"] = given["distill"][2:3]
    path = saved(tmp_path / "recipe.yaml", given)
    assert main(["distill", str(path), "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    kept = {path: path.read_bytes() for path in (tmp_path / "run" / "data").glob("*.parquet")}
    read = LatentShards(tmp_path / "run" / "data", conditions=NAMES["wan2.1"])
    pairs = list(zip(map(read.read, range(2)), made(2), strict=True))
    told = {name: torch.stack([clip[name] for clip, _ in pairs]) for name in NAMES["wan2.1"]}
    for name, x in told.items():
        source = torch.stack([clip.conditions[name] for _, clip in pairs])
        assert torch.equal(x, source[:, :, :5] if name == "image_latents" else source)
    text = torch.stack([clip.encoder_hidden_states for _, clip in pairs])
    size, seed = (5, *SIZE), drawn_seed(Use.ROLLOUT, 0, 0)
    dense = case.model("wan2.1")
    expected = torch.cat(list(stream_chunks(dense, text, *size, 2, seed=seed, conditions=told)), dim=2)
    # Observed: 0.
    assert pico.relative_error(torch.stack([clip["latents"] for clip, _ in pairs]), expected) < FLOAT32
    assert len(kept) == 3
    for path in kept:
        path.unlink()
    assert main(["distill", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert {path: path.read_bytes() for path in kept} == kept


def rolled_out(**settings: Any) -> dict[str, Any]:
    return {"data": {"kind": "rollouts", "heldout": 2, "rollouts": {**ROLLOUTS, **settings}}}


def clips_of(name: str) -> dict[str, Any]:
    return {"data": {"kind": "latents", "folder": "{folder}/" + name, "heldout": 1}}


STAGE = {"stage": "match_velocity", "steps": 1, "learning_rate": 1e-3, "preview": {"every": 1, "num_frames": 10}}


@pytest.mark.parametrize(
    ("kind", "sections", "message"),
    [
        (
            "wan2.1",
            rolled_out(prompt_embeds="{folder}/wan2.1"),
            "data.rollouts: the model is conditioned on an image, and prompts alone have none; set prompt_embeds to",
        ),
        (
            "wan2.1",
            rolled_out(prompt_embeds="{folder}/data"),
            "{folder}/data are 4x6 latent pixels, the clips would be 4x104; set latent_height: 4 and latent_width: 6",
        ),
        (
            "wan2.2",
            rolled_out(prompt_embeds="{folder}/data", num_frames=9),
            "data.rollouts.num_frames: the images in {folder}/data are encoded for 8 latent frames; lower 9 to that or",
        ),
        (
            "wan2.1",
            {"data": {"kind": "digits"}},
            "the model is conditioned on an image, and data.kind: digits has none",
        ),
        (
            "wan2.1",
            clips_of("text"),
            "conditioned on an image, but the clips in {folder}/text hold no first_frame_latent and clip_feature; ",
        ),
        (
            "wan2.1",
            clips_of("wide"),
            "data: encoder_hidden_states_image have 9 channels, {folder}/wan2.1 takes 8 (image_dim)",
        ),
        (
            "wan2.2",
            {"distill": [STAGE]},
            "distill.0.preview.num_frames: images are encoded for the 8 latent frames of a clip; lower 10 to that",
        ),
        (
            "wan2.2",
            {"real_score": {"model": "{folder}/wan2.1"}},
            "{folder}/wan2.1 reads image_latents and encoder_hidden_states_image, {folder}/wan2.2 image_latents",
        ),
    ],
)
def test_what_images_do_not_fit_is_refused_before_anything_is_made(
    kind: str, sections: dict[str, Any], message: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    if not (folder / "text").exists():
        write_latents(folder / "text", (Clip(clip.latents, clip.encoder_hidden_states) for clip in made(3)))
        wide = torch.zeros(5, 9)
        changed = [clip.conditions | {"encoder_hidden_states_image": wide} for clip in made(3)]
        clips = zip(made(3), changed, strict=True)
        write_latents(folder / "wide", (replace(clip, conditions=given) for clip, given in clips))
    given = recipe(folder, kind, **sections)
    if "real_score" in sections:
        given["distill"] = [{**given["distill"][4], "real_score": "real_score"}]
    text = json.dumps(given).replace("{folder}", str(folder))
    (tmp_path / "recipe.yaml").write_text(text)
    for command in (["recipes", "check"], ["run", "--out", str(tmp_path / "run")]):
        assert main([*command, str(tmp_path / "recipe.yaml")]) in (1, 2)
        error = " ".join(capsys.readouterr().err.split())
        assert message.replace("{folder}", str(folder)) in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_frames": 9}, "images are encoded for the 8 latent frames of a clip, rollout_frames is 9; lower it"),
        (
            {"score_frames": 4},
            "if a model is conditioned on an image, its scores need the whole rollout",
        ),
    ],
)
def test_dmd_scores_a_rollout_from_its_image_on(changes: dict[str, Any], message: str, folder: Path) -> None:
    data = open_data(DataConfig(kind="latents", folder=str(folder / "data"), heldout=1), 0, NAMES["wan2.1"])
    stage, teacher = stages()["dmd"](distill_case.make_config("dmd", **STAGES["dmd"], **changes)), case.model()
    with pytest.raises(UserError, match=message):
        stage.check(case.converted(teacher), {"teacher": teacher}, data)
