"""Options without an effect are refused, and so are values that cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from recipe_case import write_teacher
from safetensors.torch import save_file

from mla_convert.cli import main
from mla_convert.cli.inspect import _is_own
from mla_convert.errors import UserError
from mla_convert.mla import fused, kernels
from mla_convert.run.image import read_image


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def refused(capsys: Any, *arguments: object, code: int = 2) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return str(err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "4", "--denoising-steps", "1000,500"], "give num_inference_steps or denoising_steps, not both"),
        (["--hold-start"], "--hold-start holds the frames of --start"),
        (["--recache"], "--recache acts where the prompt changes"),
        (["--components", "nothere"], "reads no VAE or text encoder; leave --components out"),
        (["--seconds", "inf"], "give --endless for a video without an end"),
        (["--seconds", "nan"], "a video of nan seconds has no frames"),
        (["--seconds", "-inf"], "a video of -inf seconds has no frames"),
        (["--fps", "100000", "-o", "{tmp}/x.gif"], "a .gif plays at most 50 frames per second, not 100000"),
    ],
)
def test_generate(capsys: Any, teacher: Path, tmp_path: Path, options: list[str], message: str) -> None:
    given = [option.replace("{tmp}", str(tmp_path)) for option in options]
    assert message in refused(capsys, "generate", teacher, "--prompt", "7", "-o", tmp_path / "x.mp4", *given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--start", "--source"])
def test_a_folder_is_no_file(capsys: Any, teacher: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(UserError, match="is a folder; give an image file"):
        read_image(tmp_path)
    given = ["generate", teacher, "--prompt", "7", "-o", tmp_path / "x.mp4", option, tmp_path]
    assert f"{tmp_path} is a folder; give a {option[2:]} file" in refused(capsys, *given, code=1)


def test_components_are_read_for_later_and_negative_prompts(capsys: Any, tmp_path: Path) -> None:
    """Those of a pixel model whose first prompt is an embedding; here the components are nowhere."""
    model = pico.dense_model(in_channels=3, out_channels=3)
    model.save_pretrained(tmp_path / "model")
    save_file({"prompt_embeds": torch.zeros(3, model.config.text_dim)}, tmp_path / "embeds.safetensors")
    given = ["generate", tmp_path / "model", "--prompt-embeds", tmp_path / "embeds.safetensors", "--latent-size", "4x4"]
    given += ["--frames", "8", "-o", tmp_path / "x.mp4", "--components", tmp_path / "nothere"]
    assert "leave --components out" in refused(capsys, *given, "--guidance-scale", "1")
    for more in (["--prompt-at", "0.2:cat"], ["--guidance-scale", "2", "--negative-prompt", "bad"]):
        assert "leave --components out" not in refused(capsys, *given, *more, code=1)


def test_the_same_options_with_an_effect_are_taken(capsys: Any, teacher: Path, tmp_path: Path) -> None:
    given = ["generate", str(teacher), "--prompt", "7", "--frames", "4", "--recache", "--prompt-at", "0.06:8"]
    given += ["--denoising-steps", "1000", "--fps", "50", "-o", str(tmp_path / "x.gif")]
    assert main(given) == 0
    assert ": 4 frames, " in capsys.readouterr().out


@pytest.mark.parametrize(("channels", "unit"), [(1, "1 frame, "), (4, "1 latent frame, ")])
def test_frames_are_latent_ones_only_where_there_are_latents(
    capsys: Any, tmp_path: Path, teacher: Path, channels: int, unit: str
) -> None:
    arguments, folder = ["--prompt", "7"], teacher
    if channels == 4:
        folder = tmp_path / "latent"
        model = pico.dense_model(in_channels=4, out_channels=4)
        model.save_pretrained(folder)
        save_file({"prompt_embeds": torch.zeros(3, model.config.text_dim)}, tmp_path / "embeds.safetensors")
        arguments = ["--prompt-embeds", str(tmp_path / "embeds.safetensors"), "--latent-size", "4x4"]
    arguments += ["--frames", "1", "--steps", "1", "--guidance-scale", "1", "-o", str(tmp_path / "x.safetensors")]
    assert main(["generate", str(folder), *arguments]) == 0
    assert f": {unit}" in capsys.readouterr().out
    assert main(["generate", str(folder), *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pixels"] is (channels == 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "wan2.1-t2v-1.3b", "--latent-size", "7x9"], "--latent-size is for SOURCE; a preset takes"),
        (["--preset", "digits", "--file", "x.pt"], "--file is for SOURCE; a preset takes"),
        (["--preset", "digits", "--gpu", "0GB"], "a GPU of 0GB has no memory; give a size above 0"),
        (["--preset", "digits", "--gpu", "0"], "a GPU of 0 has no memory"),
    ],
)
def test_plan(capsys: Any, options: list[str], message: str) -> None:
    assert message in refused(capsys, "plan", *options)


def test_an_adapter_that_is_nowhere_is_said_to_be_nowhere(capsys: Any, teacher: Path) -> None:
    for source in ("zoo:digits", teacher):
        err = refused(capsys, "inspect", source, "--adapter", "nothere", code=1)
        assert f"--adapter 'nothere' does not exist, neither by itself nor in {source}" in err


def test_an_adapter_beside_a_file_is_found(teacher: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    for path in (model, tmp_path / "lora.safetensors"):
        path.touch()
    assert _is_own("lora.safetensors", str(model)) is False
    assert _is_own(str(tmp_path / "lora.safetensors"), str(model)) is True
    with pytest.raises(UserError, match="neither by itself"):
        _is_own("other.safetensors", str(model))


def test_compare_checks_its_place_first(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("")
    err = refused(capsys, "compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "afile" / "x.html", code=1)
    assert "afile is a file" in err


def test_a_reason_of_all_kernels_is_said_once(
    capsys: Any, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = kernels.Choice("torch", dict.fromkeys(fused.PATHS, "kernels run elsewhere"))
    monkeypatch.setattr(kernels, "choose", lambda *_: refused)
    given = ["generate", teacher, "--prompt", "7", "--steps", "1", "--kernels", "triton", "-o", tmp_path / "x.mp4"]
    capsys.readouterr()
    assert main([str(argument) for argument in given]) == 1
    assert capsys.readouterr().err.count("kernels run elsewhere") == 1 < len(refused.refused)
