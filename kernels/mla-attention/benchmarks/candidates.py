"""Tiles that `tune.py` measures at the geometry of Wan2.1-1.3B, by family and op; those of the tables come first."""

from __future__ import annotations

from mla_attention import attend_tiles, expand_tiles
from mla_attention.attend_tiles import Tiles as Attend
from mla_attention.expand_tiles import Tiles as Expand
from mla_attention.latent_tiles import Tiles as Latent

CANDIDATES = {
    80: {
        "attend": [
            Attend(128, 32, 8, 3),
            Attend(128, 32, 8, 4),
            Attend(128, 64, 8, 2),
            Attend(64, 64, 4, 2),
        ],
        "expand_kv": [
            expand_tiles.TILES[80],
            Expand(128, 128, 64, 8, 2),
            Expand(128, 64, 64, 4, 3),
            Expand(128, 128, 32, 8, 4),
        ],
        "latent_attention, rank 64": [
            Latent(64, 128, 32, False, 8, 3),
            Latent(64, 128, 64, True, 8, 2),
            Latent(64, 64, 64, True, 4, 2),
        ],
    },
    90: {
        "attend": [
            attend_tiles.DESCRIBED[90],
            Attend(128, 128, 8, 3),
            Attend(128, 128, 8, 2),
            Attend(128, 64, 8, 3),
            Attend(128, 128, 8, 2, described=True),
            Attend(128, 128, 8, 3, described=True),
            Attend(64, 64, 4, 2, described=True),
            Attend(64, 64, 4, 2, described=True, ahead=True),
            Attend(64, 128, 4, 2, described=True, ahead=True),
        ],
        "expand_kv": [
            expand_tiles.TILES[90],
            Expand(256, 128, 64, 8, 3),
            Expand(256, 128, 64, 8, 2),
            Expand(256, 128, 32, 8, 4),
            Expand(256, 64, 64, 4, 3),
            Expand(256, 64, 64, 4, 2),
            Expand(128, 128, 64, 4, 2),
            Expand(128, 64, 64, 4, 3),
            Expand(128, 256, 64, 8, 2),
        ],
        "latent_attention, rank 64": [
            Latent(32, 128, 64, True, 8, 3, 128),
            Latent(64, 128, 64, True, 8, 3, 128),
            Latent(64, 128, 64, True, 8, 3),
            Latent(64, 128, 128, True, 8, 2),
            Latent(64, 128, 64, True, 8, 3, 128, True),
            Latent(64, 128, 128, True, 8, 2, 0, True),
            Latent(64, 128, 128, True, 8, 3, 0, True),
            Latent(64, 64, 64, True, 4, 3, 128, True),
            Latent(64, 256, 64, True, 8, 2, 0, True),
        ],
        "latent_attention, rank 96": [
            Latent(128, 128, 64, True, 8, 3),
            Latent(128, 128, 64, True, 8, 2),
        ],
        "latent_attention, rank 128": [
            Latent(128, 128, 64, True, 8, 3),
            Latent(128, 128, 64, True, 8, 3, 0, True),
            Latent(128, 128, 128, True, 8, 2, 0, True),
        ],
        "latent_attention, rank 192": [
            Latent(128, 128, 64, True, 8, 3),
            Latent(128, 128, 64, True, 8, 2),
            Latent(64, 128, 64, True, 8, 3),
        ],
    },
    100: {
        "attend": [
            Attend(128, 128, 8, 2),
            Attend(128, 64, 8, 3),
            Attend(128, 128, 8, 2, described=True),
            Attend(128, 64, 8, 3, described=True),
        ],
        "expand_kv": [
            expand_tiles.TILES[100],
            Expand(256, 128, 64, 8, 2),
            Expand(128, 128, 64, 8, 3),
            Expand(128, 128, 64, 4, 3),
        ],
        "latent_attention, rank 64": [
            Latent(64, 128, 128, False, 8, 3),
            Latent(64, 128, 128, True, 8, 2),
            Latent(64, 128, 128, True, 8, 2, 0, True),
        ],
        "latent_attention, rank 128": [
            Latent(128, 128, 64, False, 8, 3),
            Latent(128, 128, 64, True, 8, 3),
            Latent(128, 128, 64, True, 8, 2, 0, True),
        ],
        "latent_attention, rank 192": [
            Latent(128, 128, 64, False, 8, 3),
            Latent(128, 128, 64, True, 8, 2),
        ],
    },
}
