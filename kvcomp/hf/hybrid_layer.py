"""HybridLayer: a managed layer that also holds the states of a linear layer (Falcon-H1, Zaya).

transformers keeps both in one cache layer, because one layer of the model has both. transformers'
class keeps the states; K and V belong to the method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import LinearAttentionLayer

from kvcomp.cache import LayerCache
from kvcomp.hf.layer import Layer

if TYPE_CHECKING:
    from kvcomp.hf.cache import Cache

ONE_WAY = "kvcomp: the states of a linear layer cannot take tokens back"


class HybridLayer(LinearAttentionLayer, Layer):
    """A `Layer` with states.

    Args:
        number_of_states: number of convolution and recurrence states in the model.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, owner: Cache, kv: LayerCache, number_of_states: int) -> None:
        Layer.__init__(self, owner, kv)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.is_croppable = False

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if kwargs:  # of a state; K and V come as positional arguments
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        Layer.reset(self)

    def batch_select_indices(self, indices: Any) -> None:
        LinearAttentionLayer.reorder_cache(self, indices)
        Layer.batch_select_indices(self, indices)

    def reorder_cache(self, beam_idx: Any) -> None:
        self.batch_select_indices(beam_idx)

    def activate_past_recording(self) -> None:
        raise ValueError(ONE_WAY)

    def crop(self, tokens: int) -> None:
        raise ValueError(ONE_WAY)

    def offload(self) -> None:
        Layer.offload(self)

    prefetch = offload
