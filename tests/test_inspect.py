"""`inspect`: spectra compared with an SVD, rotary pairs and predictions with conversions, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

from mla_convert.cli import main
from mla_convert.convert import ConvertConfig
from mla_convert.convert.factorize import low_rank_code
from mla_convert.convert.initialize import initialize_layer
from mla_convert.convert.probe import LayerSample
from mla_convert.convert.target import as_read, layout_target, moments, tokens
from mla_convert.distill.clip_shards import Clip, write_latents
from mla_convert.evaluate.prediction import (
    Prediction,
    default_ranks,
    error_curve,
    layout_config,
    position_error,
    recommend,
    recommend_by_weights,
)
from mla_convert.evaluate.spectrum import (
    Spectrum,
    activation_spectrum,
    gram_spectrum,
    rope_pairs,
    unrotated_error,
)
from mla_convert.load import load_source
from mla_convert.mla.rope import HEIGHT, TIME, WIDTH
from mla_convert.pipeline.inspection_clips import ClipRun, open_clips

PLOTS = ["predicted_error.png", "rank99.png", "rope_pairs.png", "spectrum_activations.png", "spectrum_weights.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A dense model of latents with 2 channels: 48 scalars per token, 24 directions of the weights."""
    folder = tmp_path_factory.mktemp("model")
    pico.dense_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    latents, _, text = pico.inputs(32, 8, 6, 4)
    write_latents(folder, [Clip(video, prompt) for video, prompt in zip(latents, text, strict=True)])
    return folder


def call(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def result(capsys, *arguments) -> dict:
    code, out, _ = call(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


@pytest.mark.parametrize("shapes", [((20, 24), (30, 24)), ((5, 24), (6, 24)), ((24, 24),)])
def test_gram_matrix_has_the_energies_of_the_svd(shapes):
    """Observed 2.1e-15 of the largest energy at these sizes, 2e-14 at 3072 x 1536."""
    scales = torch.logspace(0, -6, 24, dtype=torch.float64)
    blocks = [torch.randn(shape, dtype=torch.float64) * scales for shape in shapes]
    expected = torch.linalg.svdvals(torch.cat(blocks)).square()
    energy = gram_spectrum(*blocks).energy
    assert energy.dtype == torch.float64 and len(energy) == len(expected)
    assert float((energy - expected).abs().max() / expected[0]) < 1e-14


def test_ranks_and_shares_of_known_spectra():
    flat = Spectrum(torch.ones(200, dtype=torch.float64))
    assert (flat.rank(), flat.kept(50)) == (198, 0.25)
    assert flat.effective_rank() == pytest.approx(200)
    steep = Spectrum(torch.tensor([98.0, 1.0, 1.0], dtype=torch.float64))
    assert (steep.rank(), steep.rank(0.98), steep.kept(1), steep.kept(9)) == (2, 1, 0.98, 1.0)
    none = Spectrum(torch.zeros(3, dtype=torch.float64))
    assert (none.rank(), none.kept(1), none.effective_rank()) == (0, 1.0, 0.0)


def sample_of(key: torch.Tensor, value: torch.Tensor, rotations: torch.Tensor) -> LayerSample:
    """A sample with unit gradients, with the key at the complex `rotations` `[T, P]`."""
    fixed = torch.zeros(key.shape)
    fixed[..., 0::2] = 1
    rotated = torch.view_as_real(rotations.unsqueeze(1).expand(-1, key.shape[1], -1)).flatten(-2)
    place = torch.ones_like(rotations)
    hidden = torch.zeros(len(key), 4)
    return LayerSample(hidden, key, value, place, torch.zeros(key.shape), rotated, fixed, fixed, hidden[:0])


def test_activation_spectrum_is_the_covariance_of_keys_and_values():
    tokens = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 16, dtype=torch.float64) + 7
    key, value = tokens.unflatten(1, (2, 2, 4)).unbind(1)
    spectrum = activation_spectrum(sample_of(key, value, torch.ones(50, 2, dtype=torch.complex64)))
    expected = torch.linalg.eigvalsh(torch.cov(tokens.T, correction=0)).flip(0)
    assert float((spectrum.energy - expected).abs().max() / expected[0]) < 1e-12
    assert spectrum.rank(1.0) == 3


def test_a_pair_matters_as_much_as_it_turns():
    """Pair 0 makes a full turn, pair 1 turns a little, pair 2 not at all, and pair 3 has constant keys."""
    angles = torch.linspace(0, 2 * torch.pi, 257)[:-1]
    rotations = torch.stack([torch.polar(torch.ones(256), rate * angles) for rate in (1.0, 0.1, 0.0, 1.0)], dim=1)
    key = torch.randn(256, 2, 8)
    key[..., 6:] = 5
    lost, total = unrotated_error(sample_of(key, key, rotations))
    assert lost[2] == pytest.approx(0, abs=1e-5) and lost[3] == 0
    assert lost[0] == pytest.approx(float(key[..., :2].var(0, correction=0).sum()), rel=1e-5)
    assert float(lost[0]) < total
    rows = rope_pairs(lost, (TIME, TIME, HEIGHT, WIDTH))
    assert [(row["pair"], row["axis"]) for row in rows[:2]] == [(0, "t"), (1, "t")]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    # 1 - |mean of exp(i a)|^2 over a tenth of a turn, with the variance of random keys around it
    assert 0.02 < rows[1]["share"] < 0.1


def test_recommendations():
    predicted = {"decoupled": {"16": None, "64": 0.12}, "rotate_on_read": {"16": 0.04, "32": 0.013, "64": 0.005}}
    assert recommend(predicted, 384) == (
        "32 scalars (8.3 % of the dense cache), rotate_on_read with an exact own chunk, "
        "predicted +1.3 % velocity error before training; 16 scalars +4 %"
    )
    assert recommend({"derived": {"8": 0.3}, "baked": {"8": 0.2}}, 384).startswith("8 scalars (2.1 % of the dense")
    assert "larger --ranks" in recommend({"decoupled": {"8": None}}, 384)
    line = recommend_by_weights([Spectrum(torch.ones(100)), Spectrum(torch.ones(100))], [10, 20, 30])
    assert "99 % of the energy needs 99 of 100 directions, and rank 20 keeps 20.0 %" in line and "--data" in line


def test_default_ranks_are_the_papers_at_its_size():
    assert default_ranks(3072) == [64, 128, 192, 224, 256]
    assert default_ranks(384) == [8, 16, 24, 28, 32]
    assert all(rank % 16 == 0 for rank in default_ranks(10240))
    assert min(default_ranks(8)) >= 1


def test_prediction_counts_the_cached_key():
    prediction = Prediction(4, torch.tensor([4.0, 1.0, 0.25, 0.0]))
    errors = [prediction.relative(scalars) for scalars in (4, 5, 6, 7, 99)]
    assert errors == [None, 1.0, 0.5, 0.0, 0.0]
    assert layout_config("decoupled", 128).qk_rope_head_dim == 32
    assert layout_config("rotate_on_read", 128).qk_rope_head_dim == 0


def test_weights_alone(capsys, model, tmp_path):
    out = tmp_path / "inspected"
    found = result(capsys, model, "--ranks", "4,12,24", "--out", out)
    assert json.loads((out / "inspect.json").read_text()) == found
    assert sorted(path.name for path in out.glob("*.png")) == ["rank99.png", "spectrum_weights.png"]
    assert found["dense_scalars_per_token"] == 48 and found["data"] is None and found["predicted"] is None
    assert [row["layer"] for row in found["layers"]] == [0, 1]
    weights = load_file(model / "diffusion_pytorch_model.safetensors")
    for row in found["layers"]:
        stacked = torch.cat([weights[f"blocks.{row['layer']}.attn1.{name}.weight"] for name in ("to_k", "to_v")])
        energy = torch.linalg.svdvals(stacked.double()).square()
        assert row["rank99_weight"] == int((energy.cumsum(0) < 0.99 * energy.sum()).sum()) + 1
        assert row["energy_at"]["12"] == pytest.approx(float(energy[:12].sum() / energy.sum()))
        assert row["energy_at"]["24"] == 1
        assert row["rank99_activation"] is None and row["rope_pairs"] is None
    assert "--data" in found["recommendation"] and "\n" not in found["recommendation"]


def test_with_clips(capsys, model, clips, tmp_path):
    out = tmp_path / "inspected"
    found = result(capsys, model, "--data", clips, "--clips", "4", "--ranks", "4,16,40", "--out", out)
    assert sorted(path.name for path in out.glob("*.png")) == PLOTS
    assert found["data"] == {"clips_from": str(clips), "clips": 4, "tokens": 4 * 8 * 6}
    trial = found["measured"]
    assert (trial["position"], trial["scalars"]) == ("rotate_on_read", 16) and trial["velocity_rel_error"] > 0
    assert found["predicted"]["rotate_on_read"]["16"] == pytest.approx(trial["velocity_rel_error"])
    for row in found["layers"]:
        assert 1 <= row["rank99_output"] <= 48 and 1 <= row["rank99_activation"] <= 24
        assert row["energy_at_output"]["4"] <= row["energy_at_output"]["16"] <= 1
        assert {pair["pair"] for pair in row["rope_pairs"]} == set(range(6))
        assert sum(pair["share"] for pair in row["rope_pairs"]) == pytest.approx(1)
        shares = [pair["share"] for pair in row["rope_pairs"]]
        assert shares == sorted(shares, reverse=True)
    shared = "rotate_on_read, 2 layers a latent"
    assert set(found["predicted"]) == {"decoupled", "derived", "baked", "rotate_on_read", shared}
    assert found["predicted"][shared]["16"] < found["predicted"]["rotate_on_read"]["16"]
    for errors in found["predicted"].values():
        known = [error for error in errors.values() if error is not None]
        assert known == sorted(known, reverse=True)
    # Both again, over what is there: the numbers are the same and the folder is whole.
    again = result(capsys, model, "--data", clips, "--clips", "4", "--ranks", "4,16,40", "--out", out)
    assert {**again, "seconds": 0} == {**found, "seconds": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["inspected"]


def test_error_of_layers_that_share_a_latent_is_that_of_its_code(model, clips):
    source = load_source(str(model))
    run = ClipRun(source, open_clips(source, clips, None, None))
    config, read = ConvertConfig(kv_lora_rank=9), []

    def visit(layer, attention, sample):
        fitted, _ = as_read(sample, config)
        read.append((layout_target(attention, fitted, run.axes, config), fitted))

    run.sample(visit, lambda *_: None, 2)
    (curve, energy), (covariance, mean, metric) = error_curve(read), moments(read)
    code = low_rank_code(covariance, metric, mean, 9)
    lost = torch.eye(len(metric), dtype=torch.float64) - code.decoder @ code.encoder
    # In the unit of `position_error`: the moment of the product, not the product of the moments.
    ((numbers, probes),) = tokens(read)
    assert float(curve[9]) == pytest.approx(
        float((probes * ((numbers - mean) @ lost.T)).sum(1).square().mean()), rel=1e-4
    )
    assert float(energy[9:].sum()) == pytest.approx(float(torch.trace(metric @ lost @ covariance @ lost.T)), rel=1e-4)
    assert torch.allclose(error_curve(read, 12)[0], curve[:13], rtol=1e-4)


@pytest.mark.parametrize("layout", ["decoupled", "derived", "baked", "rotate_on_read"])
def test_predictions_are_near_what_a_conversion_does(model, clips, layout):
    """The scale comes from one trial; observed 0.71 to 1.44 times the error over layouts and ranks."""
    source = load_source(str(model))
    run = ClipRun(source, open_clips(source, clips, None, None))
    config = layout_config(layout, 12)
    errors, plans, trial = {}, {}, ConvertConfig(kv_lora_rank=12)

    def visit(layer, attention, sample):
        for position in {layout, "rotate_on_read"}:
            settings = layout_config(position, 12)
            fitted, _ = as_read(sample, settings)
            target = layout_target(attention, fitted, run.axes, settings)
            curve = error_curve([(target, fitted)])[0] + position_error(target, fitted)
            errors[position] = errors.get(position, 0) + curve
        for rank in (6, 12, 20):
            settings = config.model_copy(update={"kv_lora_rank": rank})
            plan = initialize_layer(attention, sample, run.axes, settings, rank, torch.Generator())
            plans.setdefault(rank, {})[layer] = plan
        plan = initialize_layer(attention, sample, run.axes, trial, 12, torch.Generator())
        plans.setdefault("trial", {})[layer] = plan

    def ignore(*_):
        pass

    run.sample(visit, ignore)
    scale = run.velocity_error(trial, plans["trial"], ignore) ** 2 / float(errors["rotate_on_read"][12])
    for rank in (6, 12, 20):
        measured = run.velocity_error(config.model_copy(update={"kv_lora_rank": rank}), plans[rank], ignore)
        predicted = Prediction(0, scale * errors[layout]).relative(rank)
        assert predicted is not None
        assert 0.5 < predicted / measured < 2


def test_tables_say_it_in_one_line(capsys, model, clips):
    code, out, _ = call(capsys, model, "--data", clips, "--ranks", "16,40")
    assert code == 0
    assert "rotary pairs" in out and "rotate_on_read" in out
    code, out, _ = call(capsys, model, "--ranks", "16")
    assert code == 0 and "velocity error" not in out and "--data" in out


@pytest.mark.parametrize(
    ("arguments", "message", "expected"),
    [
        (["--ranks", "16,many"], "--ranks: '16,many' is not a list of ranks", 2),
        (["--ranks", "0"], "--ranks: '0' is not a list", 2),
        (["--ranks", "49"], "--ranks: 49 is not between 1 and 48", 2),
        (["--clips", "3"], "--clips needs --data FOLDER", 2),
        (["--data", "missing"], "no .parquet shards in missing", 1),
        (["--data", "narrow"], "narrow: latents have 3 channels", 2),
        (["--data", "wordy"], "wordy: encoder_hidden_states have 9 channels", 2),
        (["--data", "odd"], "odd: latents of 5x4 do not divide into patches of 2x2", 2),
        (["--data", "short"], "one chunk long", 1),
        (["--out", "taken"], "taken exists and is not a folder of inspect", 1),
        (["--subfolder", "nowhere"], "has no folder nowhere", 1),
    ],
)
def test_refusals_are_one_line_and_write_nothing(capsys, model, tmp_path, monkeypatch, arguments, message, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "state.json").write_text("{}")
    shapes = {"narrow": ((3, 8, 6, 4), (3, 8)), "wordy": ((2, 8, 6, 4), (3, 9))}
    shapes |= {"odd": ((2, 8, 5, 4), (3, 8)), "short": ((2, 2, 6, 4), (3, 8))}
    for name, (latent, text) in shapes.items():
        write_latents(tmp_path / name, [Clip(torch.randn(latent), torch.randn(text))])
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "out"]
    code, out, err = call(capsys, model, *arguments)
    line = err.strip().splitlines()[-1]
    assert (code, out) == (expected, "")
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".*")) == []
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["state.json"]


def test_bad_weights_are_named(capsys, model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    weights = load_file(model / "diffusion_pytorch_model.safetensors")
    weights["blocks.1.attn1.to_v.weight"][0, 0] = float("nan")
    save_file(weights, broken / "diffusion_pytorch_model.safetensors")
    code, _, err = call(capsys, broken)
    assert code == 1 and "blocks.1.attn1.to_v.weight has 1 NaN or infinite" in err


def test_help_imports_nothing_heavy():
    code = "import sys; from mla_convert.cli import main; main(['inspect', '--help']); "
    code += "print(sorted({'torch', 'matplotlib', 'diffusers'} & set(sys.modules)), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "[]"
