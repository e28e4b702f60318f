"""`vbench` with a stand-in for VBench: names, resuming, both of its forms, scores and their totals in the report."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from checkpoint_case import CAUSAL, PAIRS, STOCK
from vbench_case import PROMPTS, write_checkout
from wan_pipeline_case import write_wan_pipeline

from mla_convert.cli import main
from mla_convert.distill.negative import WAN_NEGATIVE_PROMPT
from mla_convert.errors import UserError
from mla_convert.evaluate import vbench_scores as scores
from mla_convert.evaluate.report import render_html
from mla_convert.evaluate.vbench_suite import (
    DIMENSIONS,
    Prompt,
    Video,
    check_dimensions,
    draw_videos,
    read_suite,
    wanted_videos,
)
from mla_convert.export.checkpoint import save_checkpoint
from mla_convert.families.wan import MLAWanTransformer3DModel
from mla_convert.files import locked_folder, write_json
from mla_convert.pipeline import execution
from mla_convert.pipeline.embeds import StoredEmbeds
from mla_convert.run import prefetch

QUICK = ["--fps", "1", "--steps", "1", "--json"]


def save_model(folder: Path, recipe: dict[str, Any] | None = None, **changes) -> Path:
    torch.manual_seed(0)
    mla = {"position": "decoupled", "own_chunk": "exact", "kv_lora_rank": [10, 8], "v_head_dim": 12}
    settings = {**STOCK, "text_dim": 32, **changes}
    model = MLAWanTransformer3DModel(**settings, causal=CAUSAL, mla={**mla, **PAIRS["decoupled"]})
    save_checkpoint(model.eval(), folder, {} if recipe is None else {"recipe": recipe})
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return write_checkout(tmp_path_factory.mktemp("VBench"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A digits model, whose prompts need no text encoder."""
    return save_model(tmp_path_factory.mktemp("model") / "checkpoint")


def vbench(capfd, model: Path, checkout: Path, out: Path, *options: str) -> tuple[int, dict, str]:
    arguments = ["vbench", str(model), "--vbench", str(checkout), "--out", str(out), *QUICK, *options]
    code = main(arguments)
    shown = capfd.readouterr()
    return code, json.loads(shown.out) if code == 0 else {}, shown.err.strip()


def scored(*options: str) -> list[str]:
    return ["--python", sys.executable, *options]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "videos").iterdir())


SOME = ["--dimension", "subject_consistency", "--dimension", "dynamic_degree", "--dimension", "color"]


def test_from_prompts_to_the_report(capfd, checkout, model, tmp_path) -> None:
    published = tmp_path / "published.json"
    published.write_text(json.dumps({"Other <paper>": {"color": 0.75, "total": 0.8}}))
    out = tmp_path / "out"
    code, result, _ = vbench(capfd, model, checkout, out, *SOME, *scored("--published", str(published)))
    assert code == 0
    assert names(out) == sorted(f"{text}-{index}.mp4" for text in {text for text, _ in PROMPTS} for index in range(5))
    assert result["scores"] == {
        "subject_consistency": {"score": 0.9, "videos": 5},
        "dynamic_degree": {"score": 0.5, "videos": 5},
        "color": {"score": 0.5, "videos": 10},
    }
    # (0.8 / 0.9 + 0.5 * 0.5) / 1.5 by the ranges and weights of the checkout, then 4 to 1 with color.
    quality = (0.8 / 0.9 + 0.25) / 1.5
    assert result["totals"] == pytest.approx({"quality": quality, "semantic": 0.5, "total": (4 * quality + 0.5) / 5})
    report = json.loads((out / "report.json").read_text())
    assert report["vbench"]["suite"] == "VBench" and report["vbench"]["version"] == "0.1.5"
    page = (out / "report.html").read_text()
    for expected in (
        "<h2>VBench</h2>",
        "Subject consistency",
        "0.9000",
        "Other &lt;paper&gt;",
        "0.7500",
        "Total score",
    ):
        assert expected in page, expected
    reader = imageio_ffmpeg.read_frames(str(out / "videos" / names(out)[0]))
    next(reader)
    assert len(list(reader)) == 6  # 5 s at one frame a second, up to the end of a chunk


def test_it_goes_on_where_it_stopped(capfd, checkout, model, tmp_path) -> None:
    out = tmp_path / "out"
    code, whole, _ = vbench(capfd, model, checkout, out, *SOME, *scored())
    assert code == 0 and whole["drawn"] == 15
    contents = {name: (out / "videos" / name).read_bytes() for name in names(out)}
    assert len(set(contents.values())) == 15
    logs = {path: path.stat().st_mtime_ns for path in out.glob("scores/*/log.txt")}
    gone = out / "videos" / "7 at 2,2 moving up-3.mp4"
    gone.unlink()
    (out / "videos" / ".half.mp4.1.tmp").write_bytes(b"x")
    code, again, _ = vbench(capfd, model, checkout, out, *SOME, *scored())
    assert code == 0 and again["drawn"] == 1 and again["scores"] == whole["scores"]
    assert {name: (out / "videos" / name).read_bytes() for name in names(out)} == contents
    assert {path: path.stat().st_mtime_ns for path in out.glob("scores/*/log.txt")} == logs
    code, _, error = vbench(capfd, model, checkout, out, "--seed", "1", *SOME)
    assert code == 2 and "were generated with generate.seed 0, not 1" in error


def gray(value: float) -> np.ndarray:
    return np.full((2, 16, 16, 3), value, dtype=np.float32)


def three_videos() -> list[Video]:
    return [Video(Prompt(text, (), text), 0, seed) for seed, text in enumerate("abc")]


def test_videos_are_encoded_while_others_are_drawn(tmp_path, monkeypatch) -> None:
    """The video's file equals that of `save_video`; a thread writes it and may not have finished yet."""
    drawn, whole, threads = [], prefetch.save_video, set()
    begun, free = threading.Event(), threading.Event()

    def draw(told: str, seed: int) -> Iterator[np.ndarray]:
        drawn.append(told)
        if told == "b":
            # The first video is not there yet.
            assert begun.wait(60) and not (tmp_path / "a-0.mp4").exists()
            free.set()
        yield gray(0.1 * seed)
        if told != "a":
            yield gray(0.5)

    def slow(frames: Any, path: Path, *rest: Any) -> None:
        threads.add(threading.get_ident())
        begun.set()
        assert free.wait(60)
        whole(frames, path, *rest)

    monkeypatch.setattr(prefetch, "save_video", slow)
    assert draw_videos(three_videos(), tmp_path, draw, 8, lambda *_: None) == 3
    assert drawn == ["a", "b", "c"] and threading.get_ident() not in threads
    whole([gray(0.1), gray(0.5)], tmp_path / "again.mp4", 8)
    assert (tmp_path / "b-0.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, UserError])
def test_a_drawing_that_fails_leaves_whole_videos_alone(tmp_path, failure) -> None:
    def draw(told: str, seed: int) -> Iterator[np.ndarray]:
        yield gray(0.5)
        if told == "b":
            raise failure("stop")
        yield gray(0.1)

    with pytest.raises(failure):
        draw_videos(three_videos(), tmp_path, draw, 8, lambda *_: None)
    assert [path.name for path in tmp_path.iterdir()] == ["a-0.mp4"]
    before, count = (tmp_path / "a-0.mp4").read_bytes(), threading.active_count()
    assert draw_videos(three_videos(), tmp_path, lambda *_: iter([gray(0.2)]), 8, lambda *_: None) == 2
    assert len(list(tmp_path.iterdir())) == 3 and (tmp_path / "a-0.mp4").read_bytes() == before
    assert threading.active_count() == count


def test_a_video_that_cannot_be_encoded_ends_the_drawing(tmp_path, monkeypatch) -> None:
    whole = prefetch.save_video

    def full(frames: Any, path: Path, *rest: Any) -> None:
        if path.name == "a-0.mp4":
            raise UserError("the disk is full")
        whole(frames, path, *rest)

    monkeypatch.setattr(prefetch, "save_video", full)
    with pytest.raises(UserError, match="the disk is full"):
        draw_videos(three_videos(), tmp_path, lambda *_: iter([gray(0.2)]), 8, lambda *_: None)
    assert all(path.suffix == ".mp4" for path in tmp_path.iterdir())


def test_flickering_takes_more_videos_and_the_static_filter(capfd, checkout, model, tmp_path) -> None:
    out = tmp_path / "out"
    code, result, _ = vbench(capfd, model, checkout, out, "--dimension", "temporal_flickering", *scored())
    assert code == 0 and result["scores"]["temporal_flickering"] == {"score": 0.5, "videos": 25}
    assert len(list((out / "scores" / "temporal_flickering" / "filtered_videos").iterdir())) == 5


def test_long_videos_go_to_vbench_long(capfd, checkout, model, tmp_path) -> None:
    out, options = tmp_path / "out", ["--seconds", "30", "--samples", "1", "--dimension"]
    code, result, _ = vbench(capfd, model, checkout, out, *options, "temporal_flickering", *scored())
    assert code == 0 and result["suite"] == "VBench-Long"
    assert result["scores"]["temporal_flickering"] == {"score": 0.01, "videos": 1}
    assert json.loads((out / "vbench.json").read_text())["generate"]["num_frames"] == 30
    # VBench-Long leaves its clips among the videos.
    code, result, _ = vbench(capfd, model, checkout, out, *options, "color", *scored())
    assert code == 0 and result["drawn"] == 1 and result["totals"] == {"semantic": 0.02}


def test_without_its_python_videos_are_only_drawn(capfd, checkout, model, tmp_path) -> None:
    out = tmp_path / "out"
    code, result, _ = vbench(capfd, model, checkout, out, "--dimension", "dynamic_degree", "--samples", "2")
    assert code == 0 and result == {"videos": 2, "drawn": 2, "out": str(out)}
    assert not (out / "report.json").exists()


def test_it_samples_as_the_recipe_says_and_flags_go_before(capfd, checkout, tmp_path) -> None:
    generate = {"sampler": "renoise", "denoising_steps": [1000, 500], "shift": 5.0, "guidance_scale": 2.0}
    recipe = {"generate": generate, "streaming": {"kernels": "torch", "cuda_graph": "off"}}
    folder = save_model(tmp_path / "model", recipe)
    some = ["--vbench", str(checkout), "--dimension", "dynamic_degree", "--samples", "1", "--fps", "1"]

    def drawn_with(name: str, *options: str) -> dict[str, Any]:
        assert main(["vbench", str(folder), *some, "--out", str(tmp_path / name), *options]) == 0
        return json.loads((tmp_path / name / "vbench.json").read_text())["generate"]

    assert drawn_with("a").items() >= generate.items()
    changed = drawn_with("b", "--steps", "1", "--sampler", "euler", "--guidance-scale", "1")
    assert [changed[key] for key in ("num_inference_steps", "denoising_steps", "sampler")] == [1, None, "euler"]
    assert (changed["shift"], changed["guidance_scale"]) == (5.0, 1.0)
    told = drawn_with("c", "--denoising-steps", "1000,250", "--negative-prompt", "blur")
    assert (told["denoising_steps"], told["negative_prompt"]) == ([1000, 250], "blur")
    one, other = ((tmp_path / name / "videos" / "7 at 2,2 moving up-0.mp4").read_bytes() for name in "ab")
    assert one != other


def test_a_run_folder_gets_its_own_report_with_the_scores(capfd, checkout, model, tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint").symlink_to(model)
    (run / "state.json").write_text("{}")
    (run / "report.json").write_text(json.dumps({"source": "zoo:digits", "name": "mine"}))
    arguments = ["vbench", str(run), "--vbench", str(checkout), *QUICK, "--dimension", "dynamic_degree"]
    assert main([*arguments, *scored()]) == 0
    capfd.readouterr()
    report = json.loads((run / "vbench-5s" / "report.json").read_text())
    assert report["name"] == "mine" and report["vbench"]["scores"]["dynamic_degree"]["score"] == 0.5
    assert "vbench" not in json.loads((run / "report.json").read_text())


def test_a_failure_of_vbench_is_one_line_with_its_last(capfd, model, tmp_path) -> None:
    broken = write_checkout(tmp_path / "VBench")
    (broken / "broken").touch()
    out = tmp_path / "out"
    code, _, error = vbench(capfd, model, broken, out, "--dimension", "color", *scored())
    last = error.splitlines()[-1]
    assert code == 1 and "VBench failed on color (exit code 1): RuntimeError: CUDA error: out of memory; see" in last
    assert len(names(out)) == 10
    (broken / "broken").unlink()
    (broken / "evaluate.py").write_text("")
    code, _, error = vbench(capfd, model, broken, out, "--dimension", "color", *scored())
    assert code == 1 and "VBench wrote no *_eval_results.json for color" in error


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--dimension", "beauty"], 2, "VBench has no dimension beauty; it has subject_consistency"),
        (["--python", "/nowhere/python"], 1, "/nowhere/python is not a program"),
        (["--longer-prompts", "{tmp}/three.txt"], 1, "has 3 lines"),
        (
            ["--published", "{tmp}/three.txt", "--python", sys.executable],
            1,
            "must be JSON of the form {name: {dimension: value}}",
        ),
        (["--latent-size", "15x16"], 2, "15"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_drawn(capfd, checkout, model, tmp_path, options, code, message):
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    given = [option.replace("{tmp}", str(tmp_path)) for option in options]
    found, _, error = vbench(capfd, model, checkout, tmp_path / "out", *given)
    assert found == code and message in error.splitlines()[-1]
    assert not (tmp_path / "out" / "videos").exists()


def test_folders_that_are_not_what_they_should_be(capfd, checkout, model, tmp_path) -> None:
    code, _, error = vbench(capfd, model, tmp_path, tmp_path / "out")
    assert code == 1 and "is not a checkout of VBench; it has no vbench/VBench_full_info.json" in error
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    code, _, error = vbench(capfd, model, checkout, tmp_path / "full")
    assert code == 1 and "is not a VBench folder" in error
    assert main(["vbench", str(model), "--vbench", str(checkout)]) == 2
    assert "is not a run folder; give --out" in capfd.readouterr().err


def test_rewritten_prompts_are_told_and_the_short_ones_name_the_videos(checkout, tmp_path) -> None:
    (tmp_path / "longer.txt").write_text("".join(f"{text}, in soft light\n" for text, _ in PROMPTS))
    suite = read_suite(checkout, tmp_path / "longer.txt")
    assert [prompt.told for prompt in suite] == [f"{prompt.text}, in soft light" for prompt in suite]
    assert [prompt.dimensions for prompt in suite][1] == ("temporal_flickering", "color")
    (video, *_) = wanted_videos(suite, ["dynamic_degree"], 5, False, 0)
    assert video.name == "7 at 2,2 moving up-0.mp4"
    assert video.seed == wanted_videos(suite[:1], check_dimensions([]), 1, True, 0)[0].seed
    assert len({video.seed for video in wanted_videos(suite, DIMENSIONS, 5, False, 0)}) == 5 + 25 + 5


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return write_wan_pipeline(tmp_path_factory.mktemp("pipeline"))


def test_latents_with_a_text_encoder_and_a_vae(capfd, checkout, pipeline, tmp_path) -> None:
    """Prompts embedded here or by `encode --prompts` give the same videos; 5 frames are two latent ones."""
    model = save_model(tmp_path / "model", in_channels=4, out_channels=4, patch_size=(1, 2, 2))
    some = ["--dimension", "dynamic_degree", "--samples", "1", "--latent-size", "4x6", "--components", str(pipeline)]
    code, _, _ = vbench(capfd, model, checkout, tmp_path / "a", *some)
    assert code == 0 and names(tmp_path / "a") == ["7 at 2,2 moving up-0.mp4"]
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a" / "videos" / "7 at 2,2 moving up-0.mp4"))
    assert next(reader)["size"] == (384, 256) and len(list(reader)) == 5
    prompts, embeds = tmp_path / "prompts.txt", tmp_path / "embeds"
    assert main(["vbench", str(model), "--vbench", str(checkout), "--list-prompts", str(prompts)]) == 0
    assert prompts.read_text().splitlines() == list(dict(PROMPTS))
    assert main(["encode", "--prompts", str(prompts), "--out", str(embeds), "--components", str(pipeline)]) == 0
    capfd.readouterr()
    code, _, _ = vbench(capfd, model, checkout, tmp_path / "b", *some, "--prompt-embeds", str(embeds))
    assert code == 0
    one, other = (next((tmp_path / name / "videos").iterdir()).read_bytes() for name in ("a", "b"))
    assert one == other
    assert vbench(capfd, model, checkout, tmp_path / "g", *some, "--vae-dtype", "bfloat16")[0] == 0
    assert one != next((tmp_path / "g" / "videos").iterdir()).read_bytes()
    guided = [*some, "--guidance-scale", "3"]
    for name, more in (("d", ["--prompt-embeds", str(embeds)]), ("e", ["--negative-prompt", WAN_NEGATIVE_PROMPT])):
        assert vbench(capfd, model, checkout, tmp_path / name, *guided, *more)[0] == 0
    made = [next((tmp_path / name / "videos").iterdir()).read_bytes() for name in ("a", "d", "e")]
    assert made[0] != made[1] == made[2]
    (embeds / "negative.safetensors").unlink()
    code, _, error = vbench(capfd, model, checkout, tmp_path / "f", *guided, "--prompt-embeds", str(embeds))
    assert code == 2 and "guidance needs a negative prompt, and" in error and not (tmp_path / "f").exists()
    code, _, error = vbench(capfd, model, checkout, tmp_path / "c", *some[:6])
    assert code == 2 and "this checkpoint has no VAE; give --components" in error and not (tmp_path / "c").exists()
    shutil.copytree(pipeline / "vae", model / "vae")
    code, _, error = vbench(capfd, model, checkout, tmp_path / "c", *some[:6])
    assert code == 2 and "has no text encoder; give --components" in error and not (tmp_path / "c").exists()
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(pipeline / part, model / part)
    assert vbench(capfd, model, checkout, tmp_path / "c", *some[:6])[0] == 0
    assert one == next((tmp_path / "c" / "videos").iterdir()).read_bytes()
    with pytest.raises(UserError, match="embeddings of 3 prompts, VBench has 2"):
        StoredEmbeds(embeds, ["a", "b"], 32)
    with pytest.raises(UserError, match="was encoded from other prompts"):
        StoredEmbeds(embeds, ["a", "b", "c"], 32)


def test_the_totals_need_all_of_their_dimensions(checkout, tmp_path) -> None:
    assert scores.totals(checkout, {"subject_consistency": 0.9}) == {}
    assert scores.totals(tmp_path, {"color": 0.5}) == {}
    assert scores.version(tmp_path) == "unknown"


def test_a_report_without_published_values_has_one_column() -> None:
    result = {"suite": "VBench-Long", "version": "0.1.5", "seconds": 60, "samples": 5, "told": "longer"}
    result["scores"] = {"color": {"score": 0.5, "videos": 1200}}
    html = render_html({"vbench": result})
    assert html.count('<th scope="col">student</th>') == 1 and "1,200 videos" in html
    assert "VBench-Long 0.1.5 on videos of 60 s" in html and "rewritten, longer prompts" in html


def test_a_second_process_is_kept_out(capfd, checkout, model, tmp_path) -> None:
    with locked_folder(tmp_path / "out"):
        code, _, error = vbench(capfd, model, checkout, tmp_path / "out", "--dimension", "color")
    assert code == 1 and "another process is working in" in error


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [({"cache": [[4, 8], [6, 4]]}, [], (4, 6)), ({"cache": "int8"}, ["--cache", "6x8,2x4"], (6, 4))],
)
def test_latents_are_kept_in_the_bits_of_the_recipe_or_of_the_option(
    checkout, tmp_path, monkeypatch, recipe, options, expected
) -> None:
    folder = save_model(tmp_path / "model", {"streaming": recipe})
    make, caches = MLAWanTransformer3DModel.init_cache, []

    def kept(*given: Any, **more: Any) -> Any:
        caches.append(make(*given, **more))
        return caches[-1]

    monkeypatch.setattr(MLAWanTransformer3DModel, "init_cache", kept)
    some = ["--vbench", str(checkout), "--dimension", "dynamic_degree", "--samples", "1", "--out", str(tmp_path / "a")]
    assert main(["vbench", str(folder), *some, *options]) == 0
    # The first of the ranks, which is 10, with a shared key.
    assert (caches[0].bits[0].eight, caches[0].bits[0].four) == expected


def test_what_changes_the_videos_may_not_change_between_them(capfd, checkout, model, tmp_path, monkeypatch) -> None:
    """Bits of the cache and the data type of the VAE do; what only decides memory and speed does not."""
    out, some = tmp_path / "out", ["--dimension", "dynamic_degree", "--samples", "1"]
    assert vbench(capfd, model, checkout, out, *some, "--cache", "int8")[0] == 0
    record = json.loads((out / "vbench.json").read_text())
    assert record["cache"] == "int8" and not {"offload", "streaming", "kernels"} & record.keys()
    executed = ["--offload", "group", "--kernels", "torch", "--expand-history", "pass", "--cuda-graph", "off"]
    with monkeypatch.context() as patch:
        patch.setattr(execution, "load_models", lambda *_: pytest.fail("weights were read, though nothing is drawn"))
        code, again, _ = vbench(capfd, model, checkout, out, *some, "--cache", "int8", *executed)
    assert code == 0 and again["drawn"] == 0
    for options, message in (([], 'cache "int8", not null'), (["--cache", "4x8,2x4"], 'cache "int8", not "4x8,2x4"')):
        code, _, error = vbench(capfd, model, checkout, out, *some, *options)
        assert code == 2 and f"were generated with {message}; give another --out" in error
    # As an older version recorded it, of videos without these options.
    write_json(out / "vbench.json", {key: value for key, value in record.items() if key not in ("cache", "vae_dtype")})
    assert vbench(capfd, model, checkout, out, *some)[0] == 0
    code, _, error = vbench(capfd, model, checkout, out, *some, "--vae-dtype", "bfloat16")
    assert code == 2 and 'vae_dtype null, not "bfloat16"' in error
    # Nothing is bound by settings under which no video was finished, such as those that took too much memory.
    for video in (out / "videos").iterdir():
        video.unlink()
    code, again, _ = vbench(capfd, model, checkout, out, *some, "--vae-dtype", "bfloat16")
    assert code == 0 and again["drawn"] == 1
