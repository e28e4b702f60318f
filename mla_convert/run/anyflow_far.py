"""Runs `AnyFlowFARPipeline` without the dense cache that the stock pipeline allocates."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnyFlowFARPipeline
from torch import Tensor

from ..families.anyflow_far import PARTITION


class StreamingAnyFlowFARPipeline(AnyFlowFARPipeline):
    """`AnyFlowFARPipeline` for a `CausalAnyFlowFARTransformer3DModel` or an `MLAAnyFlowFARTransformer3DModel`.

    Arguments and results are the stock pipeline's. That pipeline allocates dense key and value tensors before it calls
    the transformer, which drops them at the first step. Here they are never allocated.
    """

    def __call__(
        self, *args: Any, attention_kwargs: dict[str, Any] | None = None, use_kv_cache: bool = True, **kwargs: Any
    ) -> Any:
        """Generate as the stock pipeline does. Raises ValueError for `use_kv_cache=False`."""
        if not use_kv_cache:
            raise ValueError("use_kv_cache=False is not supported, because history is only in the cache; leave it out")
        partition = kwargs.get("chunk_partition") or self.transformer.config.chunk_partition
        holder = {PARTITION: list(partition)}
        return super().__call__(
            *args, attention_kwargs={**(attention_kwargs or {}), "kv_cache": holder}, use_kv_cache=False, **kwargs
        )

    def encode_kv_cache(
        self,
        kv_cache: None,
        kv_cache_flag: None,
        chunk_partition: list[int],
        chunk_idx: int,
        output: Tensor,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None,
    ) -> None:
        """Write the last chunk of `chunk_partition` from `output` `[B, F, C, H, W]`."""
        latents, text = output[:, : sum(chunk_partition)].to(self.transformer.dtype), prompt_embeds
        if negative_prompt_embeds is not None and self.do_classifier_free_guidance:
            latents, text = torch.cat([latents] * 2), torch.cat([negative_prompt_embeds, text])
        clean = latents.new_zeros(latents.shape[:2])
        self.transformer(
            latents,
            clean,
            text,
            r_timestep=clean,
            chunk_partition=chunk_partition,
            kv_cache_flag={"is_cache_step": True},
            attention_kwargs=self.attention_kwargs,
            return_dict=False,
        )
