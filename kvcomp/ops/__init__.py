"""The ops: tensors in, tensors out, registered as ``torch.ops.kvcomp.*``.

Shapes throughout: B sequences, Hq query heads, Hkv KV heads, G = Hq / Hkv, T token slots, D head
size, P pages. K and V are [B, Hkv, T, D] with any strides on B, Hkv and T, and D contiguous.
"""

from kvcomp import _C
from kvcomp.ops._registry import OPS
from kvcomp.ops.append_attention import append_attention
from kvcomp.ops.append_rows import append_rows
from kvcomp.ops.attend_and_select import attend_and_select
from kvcomp.ops.attention_hits import attention_hits
from kvcomp.ops.compact_kv import compact_kv
from kvcomp.ops.decode_attention import decode_attention
from kvcomp.ops.fetch_rows import fetch_rows
from kvcomp.ops.hadamard import hadamard
from kvcomp.ops.kmeans import kmeans
from kvcomp.ops.latent_attention import latent_attention
from kvcomp.ops.linear_rows import linear_rows
from kvcomp.ops.merge_states import merge_states
from kvcomp.ops.norm_rows import norm_rows
from kvcomp.ops.page_scores import page_scores
from kvcomp.ops.quantize_rows import quantize_rows
from kvcomp.ops.query_similarity import query_similarity
from kvcomp.ops.recurrence_update import recurrence_update
from kvcomp.ops.rotate_keys import rotate_keys
from kvcomp.ops.rotate_rows import rotate_rows
from kvcomp.ops.segment_boundaries import segment_boundaries
from kvcomp.ops.select_pages import select_pages
from kvcomp.ops.select_units import select_units
from kvcomp.ops.select_victims import select_victims
from kvcomp.ops.store_segments import store_segments
from kvcomp.ops.store_slots import store_slots
from kvcomp.ops.unit_scores import unit_scores

HEAD_SIZES: tuple[int, ...] = _C.head_sizes  # that attention is compiled for
UNLIKE_SIZES: tuple[tuple[int, int], ...] = _C.unlike_sizes  # of K and V

__all__ = [
    "HEAD_SIZES",
    "OPS",
    "UNLIKE_SIZES",
    "append_attention",
    "append_rows",
    "attend_and_select",
    "attention_hits",
    "compact_kv",
    "decode_attention",
    "fetch_rows",
    "hadamard",
    "kmeans",
    "latent_attention",
    "linear_rows",
    "merge_states",
    "norm_rows",
    "page_scores",
    "quantize_rows",
    "query_similarity",
    "recurrence_update",
    "rotate_keys",
    "rotate_rows",
    "segment_boundaries",
    "select_pages",
    "select_units",
    "select_victims",
    "store_segments",
    "store_slots",
    "unit_scores",
]
