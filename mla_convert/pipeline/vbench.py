"""Generates videos for VBench's standard prompts, scores them with the user's VBench, and reports the scores."""

from __future__ import annotations

import functools
import gc
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..devices import default_device
from ..distill.encode import EncodeConfig, encode_prompts
from ..distill.encode.models import load_vae
from ..distill.negative import NEGATIVE, find_negative, read_negative
from ..distill.progress import Report
from ..errors import UsageError
from ..evaluate.report import REPORT_JSON, write_report
from ..evaluate.vbench_scores import Judge, read_published, totals, version
from ..evaluate.vbench_suite import Prompt, check_dimensions, draw_videos, read_suite, wanted_videos
from ..export.checkpoint import load_shape
from ..export.manifest import recorded_section, versions
from ..families.causal import CausalTransformer
from ..families.image import reads_image
from ..files import MANIFEST, claim_folder, explain_os_errors, locked_folder, sha256, write_json, write_text
from ..mla.bits import format_bits
from ..recipe.load import first_difference
from ..recipe.schema import validate
from ..run.config import GenerateConfig
from ..run.decode import frame_chunks
from ..run.decode_memory import reserve
from ..run.latents import DIGITS, check_length, check_vae, latent_frames, latent_scale, latent_size, prompt_encoder
from ..run.offload import place
from ..run.parts import PICTURES, TEXT, find_parts
from ..run.sample import embed_prompts, over_trained, rollout
from ..run.video import Written
from .comparison import read_samples
from .embeds import StoredEmbeds
from .execution import Execution
from .experts import read_model_config
from .fits import warn_of_bfloat16
from .run import this_process
from .rundir import STATE

RECORD, VIDEOS, SCORES, PROMPTS = "vbench.json", "videos", "scores", "prompts"
LONG_SECONDS = 5
"""Videos longer than this are scored by VBench-Long."""
PIXEL_FPS, LATENT_FPS = 8, 16


@dataclass(frozen=True)
class VBenchConfig(Execution):
    """Which videos are generated and how they are scored.

    `checkout` is the user's VBench repository and `python` the interpreter of its environment; without `python`
    the videos are not scored. Text encoder and VAE are those of `components`, a folder or Hub ID in diffusers
    layout, by default those of the checkpoint (see `find_parts`). `prompt_embeds`, which `encode --prompts` wrote from
    the file of `list_prompts`, replaces the text encoder. `generate` has keys of GenerateConfig.
    """

    checkout: Path
    python: str | None = None
    seconds: int = 5
    samples: int = 5
    dimensions: tuple[str, ...] = ()
    longer_prompts: Path | None = None
    prompt_embeds: Path | None = None
    components: str | None = None
    published: Path | None = None
    generate: Mapping[str, Any] = field(default_factory=dict)


def list_prompts(config: VBenchConfig, out: Path) -> int:
    """Write the text of every standard prompt, one per line, for `encode --prompts`; returns their number."""
    suite = read_suite(config.checkout, config.longer_prompts)
    write_text(out, "".join(f"{prompt.told}\n" for prompt in suite))
    return len(suite)


def run_vbench(folder: Path, out: Path | None, config: VBenchConfig, report: Report) -> dict[str, Any]:
    """Generate, score and report the videos of the model in `folder`; continues an earlier call with the same settings.

    `out` gets `videos/`, `scores/` and `vbench.json`, and if there are scores, `report.json` and `report.html`:
    the report of the run with a section for VBench. Returns the results. Raises UserError in one line.
    """
    dimensions = check_dimensions(config.dimensions)
    suite = read_suite(config.checkout, config.longer_prompts)
    judge = None
    if config.python is not None:
        found = shutil.which(config.python)
        # Keep the symbolic link: its location is what makes Python use that environment.
        python = config.python if found is None else str(Path(found).absolute())
        judge = Judge(config.checkout.resolve(), python, config.seconds > LONG_SECONDS, config.samples)
        judge.check()
    published = {} if config.published is None else read_published(config.published)
    out = _out_folder(folder, out, config.seconds)
    claim_folder(out, "VBench folder", (RECORD,))
    with locked_folder(out):
        return _run(folder, out, config, suite, dimensions, judge, published, report)


def _run(
    folder: Path,
    out: Path,
    config: VBenchConfig,
    suite: Sequence[Prompt],
    dimensions: Sequence[str],
    judge: Judge | None,
    published: Mapping[str, Any],
    report: Report,
) -> dict[str, Any]:
    long = config.seconds > LONG_SECONDS
    drawing = Drawing(folder, config, suite, out, report)
    videos = wanted_videos(suite, dimensions, config.samples, long, drawing.config.seed)
    if any(not (out / VIDEOS / video.name).exists() for video in videos):
        drawing.find_components()
    _claim(out, drawing.settings)
    with explain_os_errors(out):
        drawn = draw_videos(videos, out / VIDEOS, drawing.draw, drawing.config.fps, report)
    drawing.free()
    result = {"videos": len(videos), "drawn": drawn, "out": str(out)}
    if judge is None:
        return result
    scores = _scored(
        judge, dimensions, {d: sum(d in v.prompt.dimensions for v in videos) for d in dimensions}, out, report
    )
    vbench = {
        "suite": "VBench-Long" if long else "VBench",
        "version": version(judge.checkout),
        "seconds": config.seconds,
        "samples": config.samples,
        "told": "standard" if config.longer_prompts is None else "longer",
        "scores": scores,
        "totals": totals(judge.checkout, {name: entry["score"] for name, entry in scores.items()}),
        "published": published,
    }
    base, samples = _existing_report(folder)
    page = write_report(out, {"versions": versions(), **base, "vbench": vbench}, samples)
    return {**result, **vbench, "report": str(page)}


def _out_folder(folder: Path, out: Path | None, seconds: int) -> Path:
    if out is None and not (folder / STATE).exists():
        raise UsageError(f"{folder} is not a run folder; give --out, a folder for the videos")
    return (out or folder / f"vbench-{seconds}s").resolve()


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Record the settings of the videos in `out`. Raises UsageError if it has videos or scores of other settings."""
    path = out / RECORD
    # Without a whole video the settings may change: what ended the first attempt may have been too little memory.
    if path.exists() and (any((out / VIDEOS).glob("*.mp4")) or (out / SCORES).exists()):
        different = first_difference(json.loads(path.read_text(encoding="utf-8")), settings)
        if different:
            key, *values = different
            old, new = map(json.dumps, values)
            raise UsageError(f"the videos in {out} were generated with {key} {old}, not {new}; give another --out")
    write_json(path, settings)


class Drawing:
    """Turns prompts into videos; only shapes are read to check the model, and its weights with the first video.

    `settings` holds, as JSON values, everything that the videos depend on beyond rounding. Raises UserError if the
    model, its prompts and its VAE do not fit together.
    """

    def __init__(self, folder: Path, config: VBenchConfig, suite: Sequence[Prompt], out: Path, report: Report) -> None:
        self.folder, self.vbench, self.suite, self.out, self.report = folder, config, suite, out, report
        self.device = default_device()
        self.root, stored = read_model_config(folder)
        if reads_image(stored):
            raise UsageError(f"{folder} is an image-to-video model, and VBench's standard prompts have no images")
        warn_of_bfloat16(self.root, config.dtype, self.device)
        self.streaming = config.streaming_of(self.root)
        model = self.shape = load_shape(self.root)
        model.set_cache(self.streaming.cache)
        self.digits = prompt_encoder(model.config) == DIGITS
        scale = latent_scale(model.config)
        pixels = scale.spatial == 1
        chosen = over_trained(config.generate, recorded_section(self.root, "generate"), self.digits)
        settings: dict[str, Any] = {"fps": PIXEL_FPS if pixels else LATENT_FPS, **chosen}
        frames = latent_frames(math.ceil(settings["fps"] * config.seconds), scale.temporal)
        ends = [stop for _, stop in model.causal.chunks(frames + model.causal.num_frames_per_block)]
        settings["num_frames"] = next(stop for stop in ends if stop >= frames)
        self.config = validate(GenerateConfig, settings)
        check_length(model.config, self.config.num_frames)
        if self._is_guided and config.prompt_embeds is not None and find_negative(config.prompt_embeds) is None:
            raise UsageError(
                f"guidance needs a negative prompt, and {config.prompt_embeds} has no {NEGATIVE}; encode the prompts "
                "again or give --guidance-scale 1"
            )
        self.pixels = pixels
        try:
            model.token_grid(*latent_size(model.config, self.config))
        except ValueError as error:
            raise UsageError(str(error)) from None
        manifest = sha256(self.root / MANIFEST) if (self.root / MANIFEST).is_file() else None
        self.settings = {
            "model": str(folder.resolve()),
            "manifest_sha256": manifest,
            "generate": self.config.model_dump(mode="json"),
            "dtype": config.dtype,
            "vae_dtype": config.vae_dtype,
            # None for the recipe's, which the digest stands for.
            "cache": format_bits(self.streaming.cache) if "cache" in config.streaming else None,
            "prompts": str(config.longer_prompts or "standard"),
            "prompt_embeds": None if config.prompt_embeds is None else str(config.prompt_embeds),
            "components": config.components,
        }

    def find_components(self) -> None:
        """Look for the VAE and the text encoder that videos need. Raises UserError if there is none."""
        _ = self.vae_folder, self.text_pipeline

    @functools.cached_property
    def vae_folder(self) -> Path | None:
        """The pipeline with the VAE; None for a model that makes pixels."""
        if self.pixels:
            return None
        found = find_parts(self.root, PICTURES, self.vbench.components)
        if found is None:
            raise UsageError(
                "the model makes latents and this checkpoint has no VAE; give --components, a folder or Hub ID of its "
                "pipeline"
            )
        return found

    @functools.cached_property
    def text_pipeline(self) -> str | None:
        """Folder or Hub ID of the pipeline with the text encoder; None for a digits model and for embedded prompts."""
        if self.digits or self.vbench.prompt_embeds is not None:
            return None
        found = find_parts(self.root, TEXT, self.vbench.components)
        if found is None:
            raise UsageError(
                "the model reads text embeddings and this checkpoint has no text encoder; give --components, a folder "
                "or Hub ID of its pipeline, or --prompt-embeds"
            )
        return self.vbench.components or str(found)

    @functools.cached_property
    def models(self) -> list[CausalTransformer]:
        models = self.vbench.load(self.folder)
        self.streaming.apply(*models)
        return models

    def free(self) -> None:
        """Free the device's memory for VBench."""
        for name in ("models", "vae"):
            self.__dict__.pop(name, None)
        gc.collect()
        torch.cuda.empty_cache()

    def draw(self, prompt: str, seed: int) -> Iterator[Written]:
        """Yield the frames of a video, chunk by chunk; only this runs the model."""
        config = self.config.model_copy(update={"seed": seed})
        # The text encoder has the device to itself.
        embeds, vae = self.embed(prompt), self.vae
        negative = self.negative(embeds.shape)
        chunks = rollout(self.models, embeds, config, negative_hidden_states=negative, device=self.device)
        yield from (frames for (frames,) in frame_chunks(chunks, vae))

    @functools.cached_property
    def embed(self) -> Callable[[str], Tensor]:
        """A function from a prompt to its text embeddings `[1, L, D]`."""
        if self.digits:
            return lambda prompt: embed_prompts([prompt])
        texts = [prompt.told for prompt in self.suite]
        if self.text_pipeline is not None:
            prompts = self.out / f"{PROMPTS}.txt"
            write_text(prompts, "".join(f"{text}\n" for text in texts))
            config = EncodeConfig(self.text_pipeline, negative_prompt=self.config.negative_prompt or "")
            encode_prompts(prompts, self._embeds, config, this_process(), self.report, resume=True)
        return StoredEmbeds(self._embeds, texts, self.shape.config.text_dim)

    @property
    def _embeds(self) -> Path:
        """File or folder of the prompts' embeddings."""
        return self.vbench.prompt_embeds or self.out / PROMPTS

    @property
    def _is_guided(self) -> bool:
        """Whether guidance needs an embedded negative prompt; for digits models it is zeros."""
        return self.config.guidance_scale != 1 and not self.digits

    def negative(self, shape: Sequence[int]) -> Tensor | None:
        """The negative prompt `[1, L, D]` for embeddings of `shape`; None without guidance and for digits models."""
        path = find_negative(self._embeds) if self._is_guided else None
        return None if path is None else read_negative(path, shape[1:]).unsqueeze(0)

    @functools.cached_property
    def vae(self) -> Any:
        """The VAE that decodes the model's latents, None for a pixel model; prepares both for the device."""
        vae = None if self.vae_folder is None else self._load_vae(self.vae_folder)
        place(self.models, vae, self.device, self.vbench.offload)
        reserve(self.models, vae, *latent_size(self.shape.config, self.config), 1, self.device)
        return vae

    def _load_vae(self, folder: Path) -> Any:
        vae = load_vae(folder)
        check_vae(vae, self.shape.config, f"the VAE in {folder}", "give --components")
        self.vbench.cast(vae)
        return vae


def _scored(
    judge: Judge, dimensions: Sequence[str], counts: Mapping[str, int], out: Path, report: Report
) -> dict[str, dict[str, Any]]:
    """Score each dimension; a stored score is reused if it was computed from the same number of videos."""
    path = out / SCORES / "scores.json"
    scores: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for done, dimension in enumerate(dimensions):
        report("VBench", done, len(dimensions), dimension)
        if scores.get(dimension, {}).get("videos") != counts[dimension]:
            score = judge.score(dimension, out / VIDEOS, out / SCORES / dimension)
            scores[dimension] = {"score": score, "videos": counts[dimension]}
            write_json(path, scores)
    report("VBench", len(dimensions), len(dimensions))
    return {dimension: scores[dimension] for dimension in dimensions}


def _existing_report(folder: Path) -> tuple[dict[str, Any], Sequence[Any]]:
    """The report of the run or of its evaluation, with the run's samples; empty if there is none."""
    for parent in (folder, folder / "evaluation"):
        if (parent / REPORT_JSON).is_file():
            report: dict[str, Any] = json.loads((parent / REPORT_JSON).read_text(encoding="utf-8"))
            return report, read_samples(folder, report)
    return {}, ()
