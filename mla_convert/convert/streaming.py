"""Convert a source on disk to part files on disk, with one block in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..families.causal import LatentTransformer
from ..load import LazyTensors, Source
from .blocks import SourceBlocks
from .clips import CalibrationBatch
from .config import ConvertConfig
from .layers import Progress, convert_layers, final_ranks, ranks_of
from .parts import PartFiles
from .state import check_account, mla_config
from .surgery import empty_model


@dataclass(frozen=True)
class Converted:
    """A converted model whose weights are in part files.

    `model` is on the meta device; `tensors` holds the weights under the model's parameter names.
    """

    model: LatentTransformer
    tensors: LazyTensors


@torch.no_grad()
def convert_source(
    source: Source,
    config: ConvertConfig,
    work: Path,
    batches: Iterable[CalibrationBatch] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    identity: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Converted:
    """Convert `source` block by block, to the same bytes as `convert_model` of `load_dense(source, dtype)` on `device`.

    Every layer is written to a file in the folder `work` as soon as it is fitted. A layer whose file already exists is
    not fitted again if `config`, `seed`, `dtype`, the type of `device`, the source and `identity` are unchanged.
    `identity` (JSON) is whatever else the result depends on, such as where the `batches` come from.
    `batches` are read only for `init: activation`. `progress` is called with (phase, done, total).
    The caller removes `work` when it no longer needs the result. Raises UsageError for ranks and shapes that the model
    cannot have, and UserError for a full disk and for tensors with a NaN or an infinity.
    """
    depends_on = {
        "config": config.model_dump(mode="json"),
        "seed": seed,
        "dtype": str(dtype),
        # Activations may have another dtype there.
        "device": torch.device(device).type,
        "source": _fingerprint(source),
        "version": __version__,
        "identity": dict(identity or {}),
    }
    blocks = SourceBlocks(source, dtype, device, run=config.init == "activation")
    ranks_of(blocks, config)
    heads = blocks.model.config.num_attention_heads
    parts = PartFiles(work, depends_on, heads)
    if not parts.has_surroundings():
        parts.put_surroundings(blocks.around())
    convert_layers(blocks, config, batches, seed, parts, progress, work)
    plans = [parts.outline(layer) for layer in range(len(blocks))]
    ranks = final_ranks(blocks, config, plans)
    if config.budget is not None:
        for layer, rank in enumerate(ranks):
            parts.truncate(layer, rank)
    mla = mla_config(config, ranks, plans, blocks.model.config.attention_head_dim)
    model = empty_model(source.family, blocks.model, mla)
    tensors = parts.tensors(len(blocks))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_account(list(source.tensors), tensors.shapes(), wanted, len(blocks) if config.q_lora_rank else 0)
    tensors.release()
    return Converted(model.eval(), tensors)


def _fingerprint(source: Source) -> dict[str, Any]:
    """Identify a source and its current state by file sizes and times, without reading its tensors."""
    files = {str(file.resolve()): (file.stat().st_size, file.stat().st_mtime_ns) for file in source.tensors.files()}
    identity = {"files": files, "family": source.family.name, "config": source.config}
    return identity | {"adapters": list(source.adapters)}
