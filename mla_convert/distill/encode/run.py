"""Encodes videos or prompts shard by shard, in one process or several."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState

from ...errors import UserError
from ...files import write_text
from ...mla.conditions import conditions_of
from ...mla.image import IMAGE, TOKENS
from ..clip_shards import shard_name
from ..latents import LatentShards
from ..negative import NEGATIVE
from ..progress import Report
from ..shard_files import clips_in, of_all
from ..waiting import Notices, wait_for_files
from .config import EncodeConfig
from .models import TEXT_TOKENS, check_model, check_size, find_pipeline, has_image_encoder
from .plan import claimed, make_plan
from .shares import read_share, share_file, write_share
from .sources import find_videos, read_prompts
from .text import Embeddings, write_embeddings
from .videos import Shard, came_back, skipped_in, write_video_shards

SKIPPED = "skipped.jsonl"
_DEALT = "dealt"

Result = TypeVar("Result")


def _announced(encode: Callable[..., Result], *arguments: Any) -> Result:
    """`encode(*arguments, notices)`; the other processes of the launch learn of a failure by the notices."""
    notices = Notices.of_run()
    with notices.failing():
        return encode(*arguments, notices)


def encode_videos(
    source: Path, out: Path, config: EncodeConfig, processes: PartialState, report: Report, resume: bool = False
) -> dict[str, Any] | None:
    """Encode the videos of `source` into `shard-*.parquet` in `out`; skipped videos go to `skipped.jsonl`.

    The negative prompt's embedding is written to `negative.safetensors` beside them.

    Every process of a distributed run calls this and takes every n-th of the missing shards; the first one lists the
    source for all. The clips of a shard depend only on the names, so a resumed run writes the same bytes as an
    uninterrupted one. Shards that lack a video whose file has come back are written again. Returns a summary
    in the first process, None in the others. Raises UserError, in one line, also
    if no video could be encoded; UsageError for sizes that the VAE does not take, or for settings that differ from
    those of the encoding to resume.
    """
    return _announced(_encode_videos, source, out, config, processes, report, resume)


def _encode_videos(
    source: Path,
    out: Path,
    config: EncodeConfig,
    processes: PartialState,
    report: Report,
    resume: bool,
    notices: Notices,
) -> dict[str, Any] | None:
    started = time.monotonic()
    images, main = config.image_condition, processes.is_main_process
    entries = find_videos(source) if main else []
    folder, commit = find_pipeline(config.model, config.revision, config_only=True, images=images)
    check_model(folder, videos=True)
    check_size(folder, config.frames, config.height, config.width)
    settings = {**asdict(config), "revision": commit}
    plan = make_plan("videos", settings, [entry[:2] for entry in entries])
    size = config.shard_size
    shards = [
        Shard(out / shard_name(number), entries[first : first + size], first)
        for number, first in enumerate(range(0, len(entries), size))
    ]
    paths = [shard.path for shard in shards]

    def deal(missing: Sequence[int], launch: int) -> None:
        for process in range(1, processes.num_processes):
            share = missing[process :: processes.num_processes]
            write_share(share_file(out, launch, process), [shards[number] for number in share])

    def work(mine: Sequence[int], texts: Sequence[Embeddings], launch: int) -> None:
        find_pipeline(config.model, commit, config_only=False, images=images)
        own = (
            [shards[n] for n in mine] if main else read_share(share_file(out, launch, processes.process_index), notices)
        )
        write_video_shards(own, texts, folder, config, processes.device, report, notices.check)

    def again() -> list[Path]:
        written = [shard for shard in shards if shard.path.exists()]
        return [shard.path for shard, back in zip(written, of_all(came_back, written), strict=True) if back]

    if not _share(out, plan, resume, processes, paths, _negative(out, config), work, report, notices, deal, again):
        return None
    skipped = sorted(row for found in of_all(skipped_in, paths) for row in found)
    rows = [{"file_name": name, "reason": reason} for name, reason in skipped]
    write_text(out / SKIPPED, "".join(json.dumps(row) + "\n" for row in rows))
    encoded = len(entries) - len(skipped)
    if encoded == 0:
        name, reason = skipped[0]
        raise UserError(f"none of the {len(skipped)} videos could be encoded; see {out / SKIPPED}; {name}: {reason}")
    read = () if not images else (IMAGE, TOKENS) if has_image_encoder(folder) else (IMAGE,)
    # All clips have the same shape.
    example = LatentShards(next(path for path in paths if clips_in(path)), conditions=read).read(0)
    return {
        "out": str(out),
        "encoded": encoded,
        "skipped": rows,
        "shards": len(paths),
        "latents": list(example["latents"].shape),
        "text": list(example["encoder_hidden_states"].shape),
        **{name: list(x.shape) for name, x in conditions_of(example).items()},
        "dtype": config.dtype,
        "stored": config.latents,
        "seconds": round(time.monotonic() - started, 3),
    }


def encode_prompts(
    source: Path, out: Path, config: EncodeConfig, processes: PartialState, report: Report, resume: bool = False
) -> dict[str, Any] | None:
    """Encode the lines of `source` into `prompts-*.safetensors` in `out`: `prompt_embeds` `[N, 512, D]`.

    The negative prompt, shards, processes, resume and errors are as in `encode_videos`.
    """
    return _announced(_encode_prompts, source, out, config, processes, report, resume)


def _encode_prompts(
    source: Path,
    out: Path,
    config: EncodeConfig,
    processes: PartialState,
    report: Report,
    resume: bool,
    notices: Notices,
) -> dict[str, Any] | None:
    started = time.monotonic()
    prompts = read_prompts(source)
    folder, commit = find_pipeline(config.model, config.revision, config_only=True)
    check_model(folder, videos=False)
    settings = {key: getattr(config, key) for key in ("model", "dtype", "batch_size", "shard_size", "negative_prompt")}
    plan = make_plan("prompts", {**settings, "revision": commit}, [[prompt] for prompt in prompts])
    size = config.shard_size
    shards = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    paths = [out / f"prompts-{number:05d}.safetensors" for number in range(len(shards))]

    def work(mine: Sequence[int], texts: Sequence[Embeddings], launch: int) -> None:
        find_pipeline(config.model, commit, config_only=False)
        files = [*texts, *(Embeddings(paths[number], shards[number]) for number in mine)]
        write_embeddings(files, folder, config, processes.device, report, notices.check)

    if not _share(out, plan, resume, processes, paths, _negative(out, config), work, report, notices):
        return None
    return {
        "out": str(out),
        "encoded": len(prompts),
        "skipped": [],
        "shards": len(paths),
        "tokens": TEXT_TOKENS,
        "dtype": config.dtype,
        "seconds": round(time.monotonic() - started, 3),
    }


def _negative(out: Path, config: EncodeConfig) -> Embeddings:
    return Embeddings(out / NEGATIVE, [config.negative_prompt])


def _share(
    out: Path,
    plan: dict[str, Any],
    resume: bool,
    processes: PartialState,
    paths: Sequence[Path],
    text: Embeddings,
    work: Callable[[Sequence[int], Sequence[Embeddings], int], None],
    report: Report,
    notices: Notices,
    deal: Callable[[Sequence[int], int], None] = lambda missing, launch: None,
    again: Callable[[], Sequence[Path]] = lambda: (),
) -> bool:
    """Call `work` for this process's share of the missing `paths`, every n-th of them, with the number of the launch.

    Only the first process has to know `paths`. It deletes those of `again` first, calls `deal` with the missing numbers
    and the launch, writes `text`, waits until all files exist, and returns True; others return False.
    """

    def begin(missing: Sequence[int], launch: int) -> None:
        mine = missing[processes.process_index :: processes.num_processes]
        texts = [text] if processes.is_main_process and not text.path.exists() else []
        if mine or texts:
            work(mine, texts, launch)

    if not processes.is_main_process:
        begin(*json.loads(notices.wait(_DEALT)))
        return False

    with claimed(out, plan, resume):
        if resume:
            for path in again():
                path.unlink()
        there = {path.name for path in out.iterdir()}
        missing, launch = [number for number, path in enumerate(paths) if path.name not in there], time.time_ns()
        deal(missing, launch)
        # Not a collective: the others would be left in it if this process failed before.
        notices.tell(_DEALT, json.dumps([missing, launch]))
        begin(missing, launch)
        # A barrier would time out if other processes need long for their last shards.
        wait_for_files(paths, notices, lambda left: report("shards of other processes", len(paths) - left, len(paths)))
    return True
