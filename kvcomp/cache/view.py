"""Layer: the members of a layer that a selecting method uses.

A selecting method keeps every token and only chooses the tokens that a step reads. `LayerCache`
offers more than this. An engine with its own block table can run such a method too: it offers a
`Layer` for each attention layer, calls `method.start(cache)` for a new batch, then
`method.attend(layer, q, scale)` layer by layer, and `method.end_step(cache)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Read(TypedDict, total=False):
    """The tokens of a layer that a step reads, and where their logits go. The keys are arguments
    of `ops.decode_attention`; a step that gives none of them reads everything.

    Attributes:
        page_ids: [B, 1 or Hkv, K] int32, ascending, then -1: the pages to read, counted from the
            start of each row; left out: all tokens.
        page_size: tokens in such a page.
        seq_lens: [B] int32, tokens in those pages; left out: the lengths of the rows.
        logits: [B, Hq, capacity], filled with the logits; [B, m, Hq, capacity] for m drafts.
    """

    page_ids: Tensor
    page_size: int
    seq_lens: Tensor
    logits: Tensor


class Layer(Protocol):
    """One layer of a batch. B sequences, Hq query heads, Hkv KV heads, head size D.

    Attributes:
        cache: the batch that the layer belongs to.
        position: number of the layer among those that the method manages, from 0.
        kv_heads: Hkv.
        seq_lens: [B] int32, tokens of each row, the newest included.
        max_len: an upper bound of `seq_lens`, known on the host.
        capacity: number of slots, at least `max_len`; the width of a buffer of logits.
        sinks: [Hq], learned logits of a token without a value in every softmax; None: the model has
            none.
        shared_sets: set by the method; True if all KV heads mostly attend to the same few tokens.
            A layer may order its memory by that, or ignore it.
    """

    shared_sets: bool

    @property
    def cache(self) -> Cache: ...
    @property
    def position(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def seq_lens(self) -> Tensor: ...
    @property
    def max_len(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def sinks(self) -> Tensor | None: ...

    def attend(self, q: Tensor, scale: float, **read: Unpack[Read]) -> tuple[Tensor, Tensor]:
        """`ops.decode_attention` over this layer: q [B, Hq, D] -> out [B, Hq, D], lse [B, Hq]."""
        ...

    def attend_and_select(self, q: Tensor, scale: float, **selection: Any) -> tuple[Tensor, ...]:
        """`ops.attend_and_select` over this layer, for layers without `sinks`.

        Returns:
            out [B, Hq, D], lse [B, Hq], scores, selected_ids and selected_lens.
        """
        ...


class Cache(Protocol):
    """A batch of sequences.

    Attributes:
        layers: in model order.
        state: the method's notes on this batch, by name.
        steps: decode steps since `start`.
    """

    state: Any

    @property
    def layers(self) -> Sequence[Layer]: ...
    @property
    def steps(self) -> int: ...

    def logits_for(self, layer: Layer, q: Tensor) -> Tensor:
        """Room for the logits of a decode step: [B, Hq, layer.capacity]. Layers may share it."""
        ...
