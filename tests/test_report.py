from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from rich.console import Console

from mla_convert.cli.summary import run_table
from mla_convert.errors import UserError
from mla_convert.evaluate import figures
from mla_convert.evaluate.geometry import preset
from mla_convert.evaluate.memory import plan
from mla_convert.evaluate.report import finite, render_html, write_report
from mla_convert.evaluate.samples import Comparison, film_strips
from mla_convert.evaluate.text import digits_text, percent, signed
from mla_convert.zoo.digits.data import parse_prompt

FULL: dict[str, Any] = {
    "source": "zoo:digits",
    "dense_scalars_per_token": 384,
    "latent_scalars_per_token": 28,
    "reduction": 1 - 28 / 384,
    "dense_cache_bytes": 1_179_648,
    "latent_cache_bytes": 86_016,
    "teacher_loss": 0.2,
    "student_loss": 0.202,
    "converted_loss": 0.25,
    "loss_increase": 0.01,
    "velocity_rel_error": 0.041,
    "velocity_rel_error_by_timestep": [[0.1, 0.03], [0.5, 0.02], [0.9, 0.04]],
    "attention_rel_error": [0.03, 0.05, 0.07, 0.04],
    "accuracy": {"teacher": {"1x": 0.97, "8x": 0.94}, "student": {"1x": 0.96, "8x": 0.9}},
    "seconds": {"convert": 4.26, "distill": 182, "evaluate": 41, "total": 3700},
    "curves": [
        {"stage": "match_velocity", "step": s, "loss": 1 / s, "heldout_loss": 0.25 - s / 2000 if s % 20 == 0 else None}
        for s in range(1, 101)
    ],
    "layout": {"position": "decoupled", "own_chunk": "exact", "kv_lora_rank": [20] * 4, "q_lora_rank": None},
    "recipe": "version: 1\nsource: {model: 'zoo:digits'}\n",
    "versions": {"torch": "2.13.0"},
}


def comparison(frames: int = 12, height: int = 16, width: int = 16) -> Comparison:
    generator = np.random.default_rng(0)
    teacher, student = generator.random((2, frames, height, width, 3), dtype=np.float32)
    return Comparison("7 moving <up> & left", teacher, student, fps=8)


@pytest.mark.parametrize("gaps", [[0.03, None, 0.01, 0.09], [None] * 3, []])
def test_the_worst_layer_is_named_where_an_error_is_not_finite(
    gaps: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    original = figures.error_by_layer
    monkeypatch.setattr(figures, "error_by_layer", lambda errors: drawn.extend(errors) or original(errors))
    html = render_html({"attention_rel_error": gaps})
    if len(gaps) != 4:
        assert not drawn and "Attention output by layer" not in html
        return
    assert f"worst {percent(0.09)} in layer 3." in html and f"Mean {percent(0.13 / 3)}" in html
    # Each bar stands at its own layer.
    assert drawn[::3] == [0.03, 0.09] and math.isnan(drawn[1])


@pytest.fixture
def quick_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts that draw nothing, for tests of the page around them."""
    for name in ("heldout_loss", "training_loss", "cache_by_streams", "error_by_layer", "error_by_timestep"):
        monkeypatch.setattr(figures, name, lambda *_: "<svg></svg>")


class Page(HTMLParser):
    """Text, references and headings of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._heading = self._style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "poster")]
        self._heading, self._style = tag in ("h2", "h3"), tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        if self._heading and data.strip():
            self.headings.append(data)
        if not self._style:
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")


def test_the_page_holds_every_section_and_needs_no_network(tmp_path: Path) -> None:
    path = write_report(tmp_path, FULL, [comparison()])
    page = Page(path.read_text())
    assert page.headings == [
        "Generated videos", "7 moving <up> & left",
        "Memory", "Cache of one stream", "Cache by number of streams",
        "Distillation", "Held-out loss", "Training loss",
        "Where the error is", "Attention output by layer", "Velocity by noise level",
        "Settings",
    ]  # fmt: skip
    assert page.references
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert not re.search(r"url\((?!#)|@import|<link", path.read_text())
    for expected in (
        "Conversion of zoo:digits", "92.7 % less memory", "held-out loss is 1.0 % above", "13.7×", "86.0 kB", "1.18 MB",
        "0.2500", "+25.0 %", "4.1 %", "−1.0 points", "−4.0 points", "1 h 1 min in total", "20 in each of 4 layers",
        "worst 7.0 % in layer 2", "version: 1",
    ):  # fmt: skip
        assert expected in page.text, expected


def test_a_cache_that_grows_is_said_to_grow(tmp_path: Path) -> None:
    grown = FULL | {"latent_scalars_per_token": 480, "reduction": -0.25, "latent_cache_bytes": 1_474_560, "clips": 4}
    html = render_html(grown)
    text = " ".join(Page(html).text.split())
    assert "25.0 % more memory" in text and "1.2×" in text and "larger cache" in text
    assert "less" not in text and "smaller" not in text
    assert re.findall(r'style="width: ([0-9.]+)%"', html) == ["80.000", "100.000"]
    (tmp_path / "report.json").write_text(json.dumps(grown | {"name": "grown", "plan": {"frames": 21}}))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(run_table(tmp_path))
    assert "+25.000 %" in console.export_text()


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        (("curves",), ["Distillation", "Held-out loss", "Training loss"]),
        (("dense_cache_bytes",), ["Memory", "Cache of one stream", "Cache by number of streams"]),
        (("attention_rel_error",), ["Attention output by layer"]),
        (("velocity_rel_error_by_timestep",), ["Velocity by noise level"]),
        (("attention_rel_error", "velocity_rel_error_by_timestep"), ["Where the error is"]),
        (("layout", "recipe", "versions"), ["Settings"]),
    ],
)
@pytest.mark.usefixtures("quick_charts")
def test_a_section_without_data_does_not_appear(missing: tuple[str, ...], gone: list[str]) -> None:
    headings = Page(render_html({k: v for k, v in FULL.items() if k not in missing})).headings
    everything = Page(render_html(FULL)).headings
    assert set(gone) <= set(everything)
    assert not set(gone) & set(headings)


@pytest.mark.parametrize("key", sorted(FULL))
@pytest.mark.usefixtures("quick_charts")
def test_any_one_key_alone_makes_a_page(key: str) -> None:
    assert "</html>" in render_html({key: FULL[key]})
    assert "</html>" in render_html({k: v for k, v in FULL.items() if k != key})
    assert "</html>" in render_html({**FULL, key: None})


def test_an_empty_report_makes_a_page() -> None:
    page = Page(render_html({}))
    assert page.headings == [] and "Conversion report" in page.text
    assert "table" not in page.tags and "svg" not in page.tags


def test_report_json_is_sorted_plain_and_finite(tmp_path: Path) -> None:
    report = {
        "student_loss": float("nan"),
        "seconds": {"total": np.float32(1.5)},
        "attention_rel_error": torch.tensor([0.25, float("inf")]),
        "curves": [{"step": np.int64(3), "loss": float("-inf")}],
    }
    page = write_report(tmp_path, report)
    text = (tmp_path / "report.json").read_text()
    value = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in report.json"))
    assert value == {
        "attention_rel_error": [0.25, None],
        "curves": [{"loss": None, "step": 3}],
        "not_finite": ["student_loss", "attention_rel_error[1]", "curves[0].loss"],
        "seconds": {"total": 1.5},
        "student_loss": None,
    }
    assert list(value) == sorted(value)
    assert "Left out below because the value is not finite: student_loss" in page.read_text()
    assert finite(value) == value


def test_equal_input_gives_equal_bytes_and_no_leftovers(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_report(tmp_path / folder, FULL, [comparison()])
    for name in ("report.json", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["report.html", "report.json"]


@pytest.mark.usefixtures("quick_charts")
def test_text_from_outside_is_escaped() -> None:
    report = {**FULL, "source": "<script>x</script>", "recipe": "</pre><img src=http://a/b>", "versions": {"<b>": "&"}}
    html = render_html(report, [comparison()])
    assert "<script>x" not in html and "<img src=http" not in html and "7 moving &lt;up&gt; &amp; left" in html


def test_charts_are_well_formed_themed_and_do_not_share_ids() -> None:
    html = render_html(FULL)
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(charts) == 5
    ids: list[str] = []
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert "viewBox" in root.attrib and "width" not in root.attrib
        assert "var(--student)" in chart and "font-family" not in chart
        assert not re.search(r"#0[0-9]0[0-9]0[0-9]|#(?!0{6})[0-9a-f]{6}\b", chart), "a fixed color is left"
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))


@pytest.mark.usefixtures("quick_charts")
@pytest.mark.parametrize(("height", "width", "kind"), [(16, 16, "png"), (90, 160, "jpeg")])
def test_videos_are_embedded(tmp_path: Path, height: int, width: int, kind: str) -> None:
    sample = comparison(7, height, width)
    html = render_html(FULL, [sample])
    [video] = re.findall(r'<video src="data:video/mp4;base64,([^"]+)"([^>]*)>', html)
    for attribute in ("autoplay", "loop", "muted", "playsinline"):
        assert attribute in video[1]
    (tmp_path / "a.mp4").write_bytes(base64.b64decode(video[0]))
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    size = next(reader)["size"]
    assert f'width="{size[0]}" height="{size[1]}"' in html
    assert len(list(reader)) == 7
    assert html.count(f"data:image/{kind};base64,") == 2 * (7 if kind == "png" else 6)


@pytest.mark.parametrize(
    ("frames", "size", "numbers"),
    [
        (64, 16, [0, 1, 2, 3, 4, 60, 61, 62, 63]),
        (16, 16, [0, 2, 4, 6, 8, 9, 11, 13, 15]),
        (3, 16, [0, 1, 2]),
        (81, 90, [0, 16, 32, 48, 64, 80]),
    ],
)
def test_strips_of_long_pixel_art_show_motion(frames: int, size: int, numbers: list[int]) -> None:
    assert film_strips({"a": np.zeros((frames, size, size, 3), np.float32)})["numbers"] == numbers


def test_strips_of_a_bouncing_digit_show_it_move() -> None:
    path = parse_prompt("7 at 2,2 moving up-left").path(64)
    numbers = film_strips({"a": np.zeros((64, 16, 16, 3), np.float32)})["numbers"]
    moves = [(path[a] != path[b]).any() for a, b in itertools.pairwise(numbers) if b == a + 1]
    assert len(moves) == 7 and all(moves)


def test_numbers_keep_their_zeros_and_one_minus() -> None:
    shown = [percent(0.0029), percent(0.003), signed(-0.927), signed(0.003), percent(0.00999999), percent(-0.5)]
    shown = [text.replace("\N{NO-BREAK SPACE}", " ") for text in shown]
    assert shown == ["0.29 %", "0.30 %", "−92.7 %", "+0.30 %", "1.0 %", "−50.0 %"]
    assert [digits_text(value, 3) for value in (0.53, 0.443, -0.5, 600, 23.4)] == [
        "0.530", "0.443", "−0.500", "600", "23.4"
    ]  # fmt: skip


@pytest.mark.usefixtures("quick_charts")
def test_the_curve_says_why_it_is_not_the_tables_loss() -> None:
    why = "The losses in the table differ because they use other noise on the same clips"
    assert why in Page(render_html(FULL)).text
    assert why not in Page(render_html({"curves": FULL["curves"]})).text


def test_a_plan_adds_the_streams_of_a_card() -> None:
    wan = preset("wan2.1-t2v-1.3b")
    page = Page(render_html({**FULL, "plan": plan(wan.geometry, 192, 32, gpu="H100").model_dump()}))
    assert "Streams on H100 80 GB" in page.text
    assert "11 dense" in page.text and "62 latent" in page.text
    assert "Memory by number of streams" in page.headings
    nothing_fits = plan(preset("wan2.1-t2v-14b").geometry, 704, 32, gpu="RTX 4090").model_dump()
    page = Page(render_html({**FULL, "plan": nothing_fits}))
    assert "Streams on RTX 4090 24 GB" in page.text and "Cache by number of streams" in page.headings


def test_the_teachers_line_is_of_the_curves_own_noise() -> None:
    level = {"stage": "match_velocity", "step": 0, "heldout_loss": 0.24, "teacher_heldout_loss": 0.19}
    assert ">teacher 0.1900<" in figures.heldout_loss([level, *FULL["curves"]])
    assert ">teacher 0." not in render_html(FULL)


def test_stages_follow_one_another_whether_or_not_they_count_on() -> None:
    def page(second: range) -> str:
        rows = [{"stage": "one", "step": s, "loss": 0.5} for s in range(1, 11)]
        return render_html({"curves": rows + [{"stage": "two", "step": s, "loss": 0.1} for s in second]})

    restarted, counted_on = page(range(1, 11)), page(range(11, 21))
    assert restarted == counted_on
    assert ">two<" in restarted


def test_a_stage_that_is_trained_twice_follows_itself() -> None:
    rows = [{"stage": "one", "step": s, "loss": 0.5} for s in (0, 10, 20, 0, 10)]
    steps, _, bounds = figures.curve_of(rows, "loss")
    assert steps == [0, 10, 20, 20, 30]
    assert bounds == [("one", 0), ("one", 20)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_convert.files._create", lambda path: path.symlink_to("/dev/full"))
    with pytest.raises(UserError, match="the disk is full"):
        write_report(tmp_path, FULL)
    assert list(tmp_path.iterdir()) == []
