"""Write natural clips for training: `python -m mla_convert.zoo.natural.data --out data/natural`.

A recipe reads the folder with `data: {kind: latents, folder: data/natural, heldout: 128, split: last}`. The held-out
clips come last; all are from a video that is not used for training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ...cli.output import print_error
from ...distill import clip_shards
from ...errors import UserError
from .clips import CLIP_FRAMES, FRAME, Shot, sample_clip, shots

CLIPS_PER_SHARD = 128


def _clips(split: str, pool: tuple[Shot, ...], count: int, seed: int) -> Iterator[clip_shards.Clip]:
    for index in range(count):
        clip = sample_clip(pool, seed, index)
        prompt = "" if clip.shot.identity is None else f"{clip.shot.video}, shot {clip.shot.identity}"
        yield clip_shards.Clip(clip.video, clip.text, f"{split}-{index:06d}", prompt, width=FRAME, height=FRAME)


def write_latents(folder: Path, split: str, count: int, seed: int, first_shard: int = 0) -> list[Path]:
    """Write the first `count` clips of a split as parquet shards, numbered from `first_shard`; return the shards.

    A clip is a video `[3, 16, 32, 32]` and an embedding `[1, 16]`, float32. Raises UserError if the videos cannot be
    downloaded.
    """
    clips = _clips(split, shots(split), count, seed)
    return clip_shards.write_latents(folder, clips, CLIPS_PER_SHARD, first_shard)


def write_folder(folder: Path, train: int, heldout: int, seed: int) -> list[Path]:
    """Write `train` clips, then `heldout` clips of the held-out video. Raises UserError if `folder` has shards."""
    if any(folder.rglob("*.parquet")):
        raise UserError(f"{folder} already holds shards; choose another folder or empty it")
    shards = write_latents(folder, "train", train, seed)
    return shards + write_latents(folder, "heldout", heldout, seed, first_shard=len(shards))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/natural"))
    parser.add_argument("--train", type=int, default=2048)
    parser.add_argument("--heldout", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        shards = write_folder(args.out, args.train, args.heldout, args.seed)
    except UserError as error:
        print_error(str(error))
        raise SystemExit(error.exit_code) from None
    size = sum(path.stat().st_size for path in shards)
    print(
        f"{args.train} clips of {CLIP_FRAMES} frames of {FRAME}x{FRAME} and {args.heldout} held-out ones, "
        f"{size / 2**20:.0f} MiB in {args.out}; read them with heldout: {args.heldout} and split: last"
    )


if __name__ == "__main__":
    main()
