"""From a picture to a video: the condition equals diffusers', in the pipeline and in `generate`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import image_case as case
import numpy as np
import pico
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from image_case import picture
from PIL import Image
from safetensors.torch import load_file, save_file
from test_decode import VAES, tiny_vae
from torch import Tensor
from wan_pipeline_case import DIM

from mla_convert import StreamingMLAPipeline
from mla_convert.cli import main
from mla_convert.distill.clip_shards import Clip, write_shard
from mla_convert.distill.encode.begun import encode_begun
from mla_convert.distill.encode.models import encode_image, image_encoder
from mla_convert.errors import UsageError, UserError
from mla_convert.export.checkpoint import save_checkpoint
from mla_convert.export.config import ExportConfig
from mla_convert.export.release import export
from mla_convert.pipeline.vbench import Drawing, VBenchConfig
from mla_convert.run.batch import StreamBatch
from mla_convert.run.image import ImageLatents, image_conditions, read_image
from mla_convert.run.stream import stream_chunks

PIXELS = (32, 48)
CAUSAL = {"num_frames_per_block": 1, "window_frames": 4}
# Absolute, of values about 1; the largest errors seen on a CPU stand beside them.
LATENTS = 1e-5  # 1.2e-7
TOKENS = 1e-6  # 0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as published with Wan2.1's image-to-video models, with tiny random parts."""
    return case.write_pipeline(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model converted from its weights alone, with its source in the manifest."""
    folder = tmp_path_factory.mktemp("converted") / "checkpoint"
    dense = case.model("wan2.1", text_dim=DIM, causal=CAUSAL)
    recipe = {"generate": {"num_inference_steps": 2, "shift": 3.0}}
    save_checkpoint(case.converted(dense), folder, {"source": {"model": str(source)}, "recipe": recipe})
    return folder


@pytest.fixture(scope="module")
def pipe(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its export with the components of the source."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    export(checkpoint, folder, ExportConfig(components="copy"))
    found = StreamingMLAPipeline.from_pretrained(folder, dtype={"text_encoder": torch.float32})
    found.set_progress_bar_config(disable=True)
    return found


def stock_pipeline(folder: Path) -> Any:
    """diffusers' pipeline of the saved components."""
    return WanImageToVideoPipeline.from_pretrained(
        folder, transformer=None, scheduler=FlowMatchEulerDiscreteScheduler()
    )


def stock(vae: Any, pixels: Tensor, frames: int) -> Tensor:
    """The encoding of a whole clip, an image followed by zeros, as a transformer takes it."""
    clip = torch.cat([pixels, pixels.new_zeros(1, 3, 4 * (frames - 1), *pixels.shape[3:])], dim=2)
    mean, std = (torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        return (vae.encode(clip).latent_dist.mode() - mean) / std


@pytest.mark.parametrize("name", VAES)
def test_frame_by_frame_is_the_encoding_of_the_whole_clip(name: str) -> None:
    vae = tiny_vae(name)
    side = vae.config.scale_factor_spatial
    pixels = torch.randn(1, 3, 1, 2 * side, 3 * side, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    for frames in (1, 2, 7):
        made = encode_begun(vae, pixels, frames)
        assert made.shape == (1, 4, frames, 2, 3)
        torch.testing.assert_close(made, stock(vae, pixels, frames), rtol=0, atol=LATENTS)


def test_a_video_without_end_needs_as_many_latents_as_differ() -> None:
    vae = tiny_vae()
    endless, image = ImageLatents(vae, picture((24, 16)), 2, 3, None), picture((24, 16))
    kept = endless.latents.shape[2]
    # At the depth of Wan's own VAEs, of two blocks a stage, it is 30.
    assert kept == 22
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1).view(1, 3, 1, 16, 24)
    whole = stock(vae, pixels, kept + 20)
    torch.testing.assert_close(endless(0, kept + 20)[:, 4:], whole, rtol=0, atol=LATENTS)
    assert torch.equal(endless(1000, 1002), endless(kept, kept + 2))
    assert endless.latents[:, :4, 0].eq(1).all() and endless.latents[:, :4, 1:].eq(0).all()
    short = ImageLatents(vae, image, 2, 3, 5)
    assert short.latents.shape == (1, 8, 5, 2, 3) and torch.equal(short(2, 5), endless(2, 5))


def test_the_condition_is_what_diffusers_makes(source: Path, tmp_path: Path) -> None:
    image, wan = picture((96, 64)), stock_pipeline(source)
    pixels = wan.video_processor.preprocess(image, height=PIXELS[0], width=PIXELS[1])
    _, expected = wan.prepare_latents(pixels, 1, 4, *PIXELS, 17, torch.float32, torch.device("cpu"))
    made = ImageLatents(wan.vae, image, 4, 6, 5)
    torch.testing.assert_close(made(0, 5), expected, rtol=0, atol=LATENTS)
    with image_encoder(source, torch.device("cpu")) as embed:
        tokens = embed(image)
    torch.testing.assert_close(tokens, wan.encode_image(image, torch.device("cpu")), rtol=0, atol=TOKENS)
    # Of other proportions the center is taken, not squeezed.
    wide = picture((48, 100))
    cut = ImageLatents(wan.vae, wide.crop((0, 34, 48, 66)), 4, 6, 5)
    torch.testing.assert_close(ImageLatents(wan.vae, wide, 4, 6, 5)(0, 5), cut(0, 5), rtol=0, atol=LATENTS)


def test_a_picture_conditions_the_pipeline(pipe: Any, source: Path) -> None:
    wan, image = stock_pipeline(source), picture()
    pixels = wan.video_processor.preprocess(image, height=PIXELS[0], width=PIXELS[1])
    _, latents = wan.prepare_latents(pixels, 1, 4, *PIXELS, 17, torch.float32, torch.device("cpu"))
    told = {"image_latents": latents, "encoder_hidden_states_image": wan.encode_image(image)}
    asked = {"height": PIXELS[0], "width": PIXELS[1], "output_type": "latent", "guidance_scale": 2.0}
    text, away = pipe.encode_prompt("a red square"), pipe.encode_prompt("")
    chunks = stream_chunks(
        pipe.transformer,
        text,
        5,
        4,
        6,
        num_inference_steps=2,
        shift=3.0,
        guidance_scale=2.0,
        negative_hidden_states=away,
        conditions=told,
    )
    expected = torch.cat(list(chunks), dim=2)
    made = pipe("a red square", image=image, num_frames=17, **asked).frames
    assert pico.relative_error(made, expected) < LATENTS
    other = pipe("a red square", image=picture(seed=1), num_frames=17, **asked).frames
    assert pico.relative_error(other, expected) > 1e-3
    stream = pipe.stream("a red square", image=image, **asked)
    assert torch.equal(torch.cat([next(stream) for _ in range(5)], dim=2), made)
    stream.close()
    clean = torch.randn(1, *expected.shape[1:], generator=torch.Generator().manual_seed(3))
    restyled = pipe("a red square", image=image, source=clean, strength=0.5, **asked).frames
    assert restyled.shape == expected.shape and pico.relative_error(restyled, expected) > 1e-2
    another = pipe("a red square", image=picture(seed=1), source=clean, strength=0.5, **asked).frames
    assert pico.relative_error(another, restyled) > 1e-4
    both = pipe(["a red square", "the dark"], image=image, num_frames=5, height=32, width=48).frames
    assert both.shape == (2, 5, *PIXELS, 3)


@pytest.mark.parametrize(
    ("changes", "missing", "message"),
    [
        ({"image": None}, (), "the model is conditioned on an image; give image="),
        ({"last_image": picture()}, (), "last_image is not supported"),
        ({"image": "none.png"}, (), "none.png does not exist; give an image file"),
        ({}, ("vae",), "this pipeline has no vae to encode the image"),
        ({}, ("image_encoder",), "has no image_encoder and image_processor for the image; pass both"),
    ],
)
def test_what_an_image_lacks_is_named(
    pipe: Any, changes: dict[str, Any], missing: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in missing:
        monkeypatch.setattr(pipe, part, None)
    asked = {"image": picture(), "height": 32, "width": 48, "num_frames": 5, "output_type": "latent", **changes}
    with pytest.raises(UserError, match=message) as caught:
        pipe("a red square", **asked)
    assert "\n" not in str(caught.value)


def test_a_model_without_channels_for_an_image_takes_a_start(tmp_path: Path, source: Path) -> None:
    model = pico.dense_model(in_channels=4, out_channels=4, text_dim=DIM, causal=CAUSAL)
    pipe = StreamingMLAPipeline(model, AutoencoderKLWan.from_pretrained(source / "vae"))
    asked = {"prompt_embeds": torch.zeros(1, 3, DIM), "height": 32, "width": 48, "num_frames": 5}
    with pytest.raises(UsageError, match="has no channels for image=; use start= to continue an image"):
        pipe(**asked, image=picture())
    flf2v = case.model("wan2.1", text_dim=DIM, pos_embed_seq_len=5)
    with pytest.raises(UsageError, match="reads a first and a last image, which streaming does not support; use"):
        StreamingMLAPipeline(flf2v, pipe.vae)(**asked, image=picture())
    other = case.model("wan2.2", in_channels=13, text_dim=DIM, causal=CAUSAL)
    with pytest.raises(UserError, match="reads 9 channels of an image, but this VAE makes 8"):
        StreamingMLAPipeline(other, pipe.vae)(**asked, image=picture())


def test_exports_carry_the_image_encoder_of_a_model_that_reads_it(
    pipe: Any, checkpoint: Path, source: Path, tmp_path: Path
) -> None:
    assert pipe.image_encoder.config.hidden_size == 8 and pipe.image_encoder.dtype == torch.float32
    assert "image_processor" in json.loads((Path(pipe.config._name_or_path) / "model_index.json").read_text())
    card = (Path(pipe.config._name_or_path) / "README.md").read_text()
    assert (
        "pipeline_tag: image-to-video" in card
        and ', image="first.png").frames[0]' in card
        and "does not include" not in card
    )
    (shown,) = re.findall(r"```python\n(dtype, frames = .*?)```", card, re.DOTALL)
    exec(shown, {"torch": torch, "transformer": pipe.transformer})
    dense = case.model("wan2.2", text_dim=DIM, causal=CAUSAL)
    save_checkpoint(dense, tmp_path / "checkpoint", {"source": {"model": str(source)}})
    export(tmp_path / "checkpoint", tmp_path / "out", ExportConfig(components="copy"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == [
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    ]
    export(checkpoint, tmp_path / "alone", ExportConfig(form="standalone"))
    assert StreamingMLAPipeline.from_pretrained(tmp_path / "alone").transformer.needed_conditions


def generated(capsys: Any, *arguments: Any) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["generate", *map(str, arguments)])
    return code, capsys.readouterr().err.strip()


def test_generate_takes_an_image(
    capsys: Any, checkpoint: Path, pipe: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture().save(tmp_path / "image.png")
    common = ["--prompt", "a red square", "--frames", "3", "--size", "32x48"]
    image, out = ["--image", tmp_path / "image.png"], tmp_path / "out.safetensors"
    code, err = generated(capsys, checkpoint, *common, *image, "--out", out)
    assert code == 0, err
    monkeypatch.setattr(pipe, "text_encoder", pipe.text_encoder.to(torch.bfloat16))
    made = pipe("a red square", image=picture(), num_frames=9, height=32, width=48, output_type="latent").frames
    # Embeddings are rounded to bfloat16 by `generate`; observed: 0.
    assert pico.relative_error(load_file(out)["latents"], made[0]) < LATENTS
    for offload in ("none", "model"):
        code, err = generated(
            capsys,
            checkpoint,
            *common,
            *image,
            "--vae-dtype",
            "bfloat16",
            "--offload",
            offload,
            "-o",
            tmp_path / offload,
        )
        assert code == 0 and len(list((tmp_path / offload).iterdir())) == 9, err
    for path in (tmp_path / "none").iterdir():
        assert path.read_bytes() == (tmp_path / "model" / path.name).read_bytes()

    pico.dense_model(in_channels=4, out_channels=4, text_dim=DIM).save_pretrained(tmp_path / "t2v")
    (tmp_path / "text.png").write_text("no picture")
    case.model("wan2.1", text_dim=DIM).save_pretrained(tmp_path / "i2v")
    parts = ["--components", source]
    for given, expected, message in (
        ([checkpoint], 2, "the model is conditioned on an image; give --image"),
        ([tmp_path / "t2v", *image], 2, "the model has no channels for --image; use --start to continue an image"),
        ([checkpoint, "--image", tmp_path / "text.png"], 1, "text.png cannot be read as an image"),
        ([checkpoint, "--image", tmp_path / "a.mp4"], 1, "a.mp4 does not exist; give an image file"),
        ([checkpoint, "--image", out], 2, "out.safetensors is not a single image; give a picture"),
    ):
        code, err = generated(capsys, *given, *common, *parts, "--out", tmp_path / "x.mp4")
        assert (code, message in err, err.count("\n")) == (expected, True, 0), err
    code, err = generated(
        capsys, tmp_path / "i2v", *common[2:], *image, "--prompt-embeds", _embeds(tmp_path), "--out", tmp_path / "x.mp4"
    )
    assert code == 2 and "this checkpoint has no image encoder, which the model needs; give --components" in err
    assert not (tmp_path / "x.mp4").exists()


def _embeds(folder: Path) -> Path:
    save_file({"prompt_embeds": torch.zeros(512, DIM)}, folder / "embeds.safetensors")
    return folder / "embeds.safetensors"


def test_pictures_in_other_modes_are_read(tmp_path: Path) -> None:
    Image.new("LA", (4, 4), (7, 9)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (7, 7, 7)
    with pytest.raises(UserError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")


def test_clips_without_images_refuse_the_model(
    capsys: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`convert` takes it, from its weights alone, and the result generates."""
    case.model("wan2.1", text_dim=DIM).save_pretrained(tmp_path / "i2v")
    picture().save(tmp_path / "image.png")
    recipe = {
        "version": 1,
        "name": "i2v",
        "source": {"model": str(tmp_path / "i2v"), "components": str(source)},
        "causal": CAUSAL,
        "convert": {"kv_lora_rank": 20, "position": "rotate_on_read", "init": "svd"},
        "data": {"kind": "latents", "folder": str(tmp_path / "none")},
        "distill": [{"stage": "match_velocity", "steps": 1, "learning_rate": 1e-3, "batch_size": 1}],
    }
    clips = [Clip(torch.zeros(4, 2, 4, 6), torch.zeros(512, DIM)) for _ in range(3)]
    write_shard(tmp_path / "none" / "a.parquet", clips)
    (tmp_path / "train.yaml").write_text(json.dumps(recipe))
    (tmp_path / "convert.yaml").write_text(json.dumps({**recipe, "distill": []}))
    refused = "is conditioned on an image, but the clips in {} hold no first_frame_latent and clip_feature; encode the"
    refused = refused.format(tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    for command in (
        ["distill", "train.yaml", "--dry-run"],
        ["recipes", "check", "train.yaml"],
        ["run", "convert.yaml", "--out", "run"],
    ):
        assert main(command) == 1
        error = " ".join(capsys.readouterr().err.split())
        assert refused in error and "`mla-convert encode --image-condition` and the model's own pipeline" in error
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="is an image-to-video model, and VBench's standard prompts have no images"):
        Drawing(tmp_path / "i2v", VBenchConfig(tmp_path), [], tmp_path, lambda *told: None)
    assert main(["convert", "convert.yaml", "--out", "converted"]) == 0
    made = ["converted/stages/00-convert", "--prompt", "a red square", "--frames", "2", "--steps", "1"]
    code, err = generated(capsys, *made, "--size", "32x48", "--image", "image.png", "--out", "a.safetensors")
    assert code == 0, err
    assert load_file("a.safetensors")["latents"].shape == (4, 2, 4, 6)


def test_a_stream_of_a_batch_takes_what_is_made_of_an_image(pipe: Any) -> None:
    tokens = encode_image(pipe.image_processor, pipe.image_encoder, picture())
    told = image_conditions(pipe.transformer.config, picture(), pipe.vae, 4, 6, None, tokens)
    text = pipe.encode_prompt("a red square")
    chunks = stream_chunks(pipe.transformer, text, 3, 4, 6, num_inference_steps=1, conditions=told)
    batch = StreamBatch(pipe.transformer, 1, 4, 6, num_inference_steps=1)
    batch.join(text[0], num_frames=3, conditions=told)
    assert torch.equal(torch.cat([c.latents for c in batch.chunks()], dim=1), torch.cat(list(chunks), dim=2)[0])
    with pytest.raises(UserError, match="reads the image's CLIP tokens; encode them with its image encoder"):
        image_conditions(pipe.transformer.config, picture(), pipe.vae, 4, 6, None)
