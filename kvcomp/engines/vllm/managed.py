"""One attention layer of vLLM whose decode rows kvcomp runs; shared by the backends."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from kvcomp.engines.vllm.placing import manageable
from kvcomp.engines.vllm.step import PlacedLayer, Step


class Metadata(Protocol):
    """What a backend knows of one batch, for one group of layers.

    Attributes:
        num_decodes: first rows, with one token each.
        step: what these rows are decoded over; None without any.
        prompts: the other rows; None without any.
    """

    num_decodes: int
    step: Step | None
    prompts: Any


class ManagedLayer:
    """Comes before vLLM's own implementation among the bases of a backend's.

    Attributes:
        managed: whether a method runs this layer; otherwise it is vLLM's own.
        placed: the layer as the method sees it; set by the builder, when all layers are known.
    """

    no_window: Any  # vLLM's word for a layer without a sliding window
    scale: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own: Any = self
        self.managed = manageable(own, own.sliding_window != self.no_window)
        self.placed: PlacedLayer | None = None

    def keys_and_values(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """The pools [pages, Hkv, P, D] of a cache, views."""
        raise NotImplementedError

    def knows(self, metadata: Any) -> bool:
        """Whether a managed layer is to run: without metadata vLLM warms up."""
        return metadata is not None

    def attend_to_prompts(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: Any,
        output: Tensor,
    ) -> None:
        """The rows behind the decode rows; all tensors are those of the whole batch."""
        raise NotImplementedError

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output [tokens, Hq, D]; kv_cache [pages, Hkv, P, 2 * D]."""
        batch = layer, query, key, value, kv_cache, attn_metadata, output
        if not self.managed or not self.knows(attn_metadata):
            own: Any = super()
            return own.forward(*batch, output_scale, output_block_scale)
        found: Metadata = attn_metadata
        if found.step is not None:
            count = found.num_decodes
            k, v = self.keys_and_values(kv_cache)
            assert self.placed is not None, "the builder places all layers before the first step"
            self.placed.decode(query[:count], k, v, found.step, self.scale, output[:count])
        if found.prompts is not None:
            self.attend_to_prompts(*batch)
        return output
