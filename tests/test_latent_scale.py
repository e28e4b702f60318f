"""The scale of latents is derived from the transformer's channels wherever it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from safetensors.torch import load_file, save_file

from mla_convert import StreamingMLAPipeline
from mla_convert.cli import main
from mla_convert.errors import UserError
from mla_convert.export.checkpoint import save_checkpoint
from mla_convert.families.wan import CausalWanTransformer3DModel
from mla_convert.pipeline.planning import read_geometry
from mla_convert.run.config import GenerateConfig
from mla_convert.run.latents import check_vae, latent_scale, latent_size

DIM = 8
TI2V = {"in_channels": 48, "out_channels": 48, "causal": {"num_frames_per_block": 1, "window_frames": 2}}
# A residual VAE with patches, as Wan2.2-TI2V-5B has, but small.
WAN22 = {"base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1, 1, 1, 1], "is_residual": True, "in_channels": 12}
WAN22 |= {"out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}


def tiny_vae(channels: int, **settings: Any) -> Any:
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    return AutoencoderKLWan(z_dim=channels, num_res_blocks=1, **statistics, **settings).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 48 latent channels with its VAE beside it, and prompt embeddings."""
    made = tmp_path_factory.mktemp("ti2v")
    save_checkpoint(pico.dense_model(layers=1, **TI2V), made / "checkpoint", {})
    tiny_vae(48, **WAN22).save_pretrained(made / "checkpoint" / "vae")
    tiny_vae(48, base_dim=3, dim_mult=[1, 1, 1, 1]).save_pretrained(made / "other" / "vae")
    save_file({"prompt_embeds": torch.zeros(3, DIM)}, made / "embeds.safetensors")
    return made


def generate(folder: Path, out: Path, *more: str) -> int:
    common = ["generate", folder / "checkpoint", "--prompt-embeds", folder / "embeds.safetensors", "--steps", "1"]
    return main([*map(str, common), "--out", str(out), *more])


@pytest.mark.parametrize(
    ("channels", "expected"),
    [((16, 16), (4, 8, (60, 104))), ((36, 16), (4, 8, (60, 104))), ((48, 48), (4, 16, (44, 80)))],
)
def test_the_scale_of_published_models(channels: tuple[int, int], expected: Any) -> None:
    config = {"in_channels": channels[0], "out_channels": channels[1], "text_dim": 4096}
    assert latent_scale(config) == expected
    assert latent_size(config, GenerateConfig()) == expected[2]
    assert latent_size(config, GenerateConfig(latent_height=8)) == (8, expected[2][1])


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_their_own_latents(channels: int) -> None:
    assert latent_scale({"in_channels": channels, "out_channels": channels})[:2] == (1, 1)


def test_the_defaults_of_diffusers_are_those_of_16_channels() -> None:
    with torch.device("meta"):
        vae, model = AutoencoderKLWan(), CausalWanTransformer3DModel(num_layers=1)
    check_vae(vae, model.config, "it", "no")


def test_a_vae_really_has_the_scale_that_its_configuration_says() -> None:
    for vae, config in ((tiny_vae(48, **WAN22), {"out_channels": 48}), (tiny_vae(16, base_dim=3), {})):
        scale = latent_scale(config)
        with torch.no_grad():
            video = vae.decode(torch.zeros(1, vae.config.z_dim, 2, 1, 2)).sample
        assert video.shape[2:] == (1 + scale.temporal, scale.spatial, 2 * scale.spatial)


def test_a_size_in_pixels_is_that_of_the_video(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert generate(folder, tmp_path / "frames", "--size", "64x96", "--seconds", "0.3") == 0
    pictures = sorted((tmp_path / "frames").iterdir())
    # 5 frames at 16 a second are two latent ones. Small pictures are enlarged by a whole factor.
    assert len(pictures) == 5
    with Image.open(pictures[0]) as picture:
        assert picture.width * 64 == picture.height * 96 and picture.height % 64 == 0
    assert generate(folder, tmp_path / "l.safetensors", "--size", "64x96", "--frames", "2") == 0
    assert load_file(tmp_path / "l.safetensors")["latents"].shape == (48, 2, 4, 6)
    capsys.readouterr()
    assert generate(folder, tmp_path / "x.mp4", "--size", "72x96") == 2
    assert "a height of 72 is not a multiple of the VAE's 16; use 64" in capsys.readouterr().err
    assert generate(folder, tmp_path / "x.mp4", "--size", "48x96") == 2
    assert "use a height of 4 (64 pixels)" in capsys.readouterr().err


def test_without_a_size_it_is_the_models_own(folder: Path, tmp_path: Path) -> None:
    assert generate(folder, tmp_path / "l.safetensors", "--frames", "1") == 0
    assert load_file(tmp_path / "l.safetensors")["latents"].shape == (48, 1, 44, 80)
    geometry, _ = read_geometry(str(folder / "checkpoint" / "transformer"), None)
    assert (geometry.tokens_per_frame, geometry.temporal_compression) == (22 * 40, 4)


def test_a_vae_of_another_scale_is_refused(folder: Path, tmp_path: Path, capsys: Any) -> None:
    capsys.readouterr()
    assert generate(folder, tmp_path / "x.mp4", "--frames", "1", "--components", str(folder / "other")) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == (
        f"error: a latent of the VAE in {folder / 'other'} covers 4 frames of 8x8 pixels, but one of a model of "
        "48 channels covers 4 frames of 16x16; give --components"
    )
    with pytest.raises(UserError, match="it has latents of 4 channels, but the model makes 48; no"):
        check_vae(tiny_vae(4, **WAN22), TI2V, "it", "no")


def test_the_pipeline_takes_the_same_scale(folder: Path) -> None:
    model, text = pico.dense_model(layers=1, **TI2V), torch.zeros(1, 3, DIM)
    settings = {"prompt_embeds": text, "num_inference_steps": 1}
    pipe = StreamingMLAPipeline(model)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae_scale == (4, 16)
    assert pipe(num_frames=1, output_type="latent", **settings).frames.shape == (1, 48, 1, 44, 80)
    pipe.vae = tiny_vae(48, **WAN22)
    assert pipe(num_frames=5, height=64, width=96, **settings).frames.shape == (1, 5, 64, 96, 3)
    pipe.vae = tiny_vae(48, base_dim=3, dim_mult=[1, 1, 1, 1])
    with pytest.raises(UserError, match=r"a latent of the pipeline's vae covers 4 frames of 8x8 pixels, .* of 16x16"):
        pipe.stream(**settings)
