"""The ops: tensors in, tensors out, registered as ``torch.ops.kvcomp.*``.

Shapes throughout: B sequences, Hq query heads, Hkv KV heads, G = Hq / Hkv, T token slots, D head
size, P pages. K and V are [B, Hkv, T, D] with any strides on B, Hkv and T, and D contiguous.
"""

from kvcomp.ops._registry import OPS
from kvcomp.ops.decode_attention import decode_attention
from kvcomp.ops.merge_states import merge_states
from kvcomp.ops.page_scores import page_scores
from kvcomp.ops.select_pages import select_pages

__all__ = ["OPS", "decode_attention", "merge_states", "page_scores", "select_pages"]
