"""Counts how often shards are opened."""

from __future__ import annotations

from collections import Counter

from mla_convert.distill import shard_files


def count_openings(monkeypatch):
    """How often each shard is opened from now on, by file name; none is open at first."""
    counted, own = Counter(), shard_files.pq.ParquetFile

    def opening(path, **settings):
        counted[path.name] += 1
        return own(path, **settings)

    shard_files._open.cache_clear()
    monkeypatch.setattr(shard_files.pq, "ParquetFile", opening)
    return counted
