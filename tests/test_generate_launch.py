"""`mla-convert generate` in the processes of a launch: one video, one voice, one exit code."""

from __future__ import annotations

import json
from pathlib import Path

import generate_case
import numpy as np
import pico
import pytest
from launched import free_ports, launched
from PIL import Image
from recipe_case import write_teacher
from safetensors.torch import load_file
from test_generate_cli import SIZE, WAN, frames_of
from test_source_video import write_video
from wan_pipeline_case import write_wan_pipeline

from mla_convert.cli import main

PROMPTS = "- {seconds: 0, prompt: 7 moving up}\n- {seconds: 0.5, prompt: 3 moving left}\n"
SHORT = ["--frames", "9", "--steps", "2"]


class Launched:
    """The commands of a launch of two processes, what each process printed and its exit codes, and the same alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        digits, pipeline = str(write_teacher(folder / "digits")), write_wan_pipeline(folder / "pipeline")
        pico.dense_model(**WAN).save_pretrained(pipeline / "transformer")
        Image.new("RGB", (96, 64), (200, 30, 30)).save(folder / "start.png")
        video = str(write_video(folder / "source.mp4", 24))
        (folder / "prompts.yaml").write_text(PROMPTS)
        words = ["--prompt", "a red square", "--negative-prompt", "dark", "--guidance-scale", "2", *SIZE]
        wan = ["generate", str(pipeline), *words, "--start", str(folder / "start.png"), "--frames", "3", "--out"]
        restyle = ["generate", digits, "--source", video, "--strength", "0.6", *SHORT]
        alone = [
            [*restyle, "--prompts", str(folder / "prompts.yaml"), "--out", str(folder / "alone.safetensors")],
            [*wan, str(folder / "alone")],
        ]
        shared = [
            ["", *restyle, "--prompts", "/dev/stdin", "--json", "--out", str(folder / "shared.safetensors")],
            ["", *wan, str(folder / "shared")],
            ["", "generate", digits, "--out", str(folder / "never.mp4")],
            *(
                [event, "generate", digits, "--prompt", "7", "--endless", "--steps", "1", "--out", str(folder / name)]
                for event, name in (
                    ("interrupt", "ended.mp4"),
                    ("fail", "failed.mp4"),
                    ("terminate", "terminated.mp4"),
                )
            ),
        ]
        assert [main(command) for command in alone] == [0, 0]
        ports = free_ports(len(shared))
        commands = [[str(port), *command] for port, command in zip(ports, shared, strict=True)]
        done = launched(2, Path(generate_case.__file__), json.dumps(commands), given=PROMPTS)
        self.printed = done[0].out, done[1].out
        texts = [one.err.split("\ncode ") for one in done]
        assert all(len(found) == len(shared) + 1 for found in texts), texts
        # After each command comes its code, and then what the next one printed.
        self.codes = [[int(text.split("\n", 1)[0]) for text in found[1:]] for found in texts]
        self.errors = [
            [[line for line in text.splitlines() if line.startswith("error: ")] for text in found[:-1]]
            for found in texts
        ]
        self.texts = texts


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return Launched(tmp_path_factory.mktemp("launch"))


def test_one_video_is_made_of_what_the_first_process_reads(done: Launched) -> None:
    alone, shared = (load_file(done.folder / f"{name}.safetensors")["latents"] for name in ("alone", "shared"))
    assert alone.shape[1] == 9
    # Observed 4.8e-7.
    assert pico.relative_error(shared, alone) < 1e-6
    pictures = [sorted((done.folder / name).iterdir()) for name in ("alone", "shared")]
    assert len(pictures[0]) == len(pictures[1]) == 9
    for one, other in zip(*pictures, strict=True):
        levels = [np.asarray(Image.open(path)).astype(int) for path in (one, other)]
        assert abs(levels[0] - levels[1]).max() <= 1


def test_all_processes_exit_alike_and_the_first_one_speaks(done: Launched) -> None:
    assert done.codes == [[0, 0, 2, 130, 1, 143]] * 2, done.texts
    result = json.loads(done.printed[0][: done.printed[0].index("\n}\n") + 2])
    assert result["paths"] == [str(done.folder / "shared.safetensors")] and result["frames"] == 9
    assert done.printed[1] == ""
    first, other = done.errors
    assert first[:2] == other[:2] == [[], []]
    assert first[2] == ["error: no prompt; give --prompt, --prompt-embeds, or --prompts with an entry at 0 seconds"]
    assert first[3] == ["error: interrupted"] and other[2:4] == [[], []]
    assert first[5] == ["error: terminated"] and other[5] == []


@pytest.mark.parametrize("name", ["ended", "terminated"])
def test_a_signal_ends_the_video_with_a_whole_chunk(name: str, done: Launched) -> None:
    """It comes in the third chunk, which is finished, because the other process waits in it."""
    assert frames_of(done.folder / f"{name}.mp4") == 3 * 3


def test_a_process_that_fails_ends_the_others(done: Launched) -> None:
    first, other = done.errors
    assert first[4] == ["error: process 1 failed; see its error message"]
    assert other[4] == ["error: this process has no memory left"]
    assert not [path for path in done.folder.iterdir() if "failed" in path.name or "never" in path.name]
