"""store_slots: write K and V of new tokens into the pages of a pool."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream


def store_slots(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor) -> None:
    """Write token i to place slot % P of page slot // P, with slot = slot_mapping[i].

    An engine that shares a pool of pages between sequences gives each new token such a slot. The
    pools are in the form that `decode_attention` reads.

    Args:
        k, v: [N, H, D] of one dtype: fp32, fp16, bf16, or int8 for codes; any strides on N and H, D
            contiguous, a multiple of 16 and at most 1024. V has D columns, or any such number, or
            0.
        k_pool, v_pool: [pages, H, P, D] of the same dtype, any strides but that of D, written. Both
            may be parts of one tensor, but share no element.
        slot_mapping: [N] int64, contiguous; distinct ones below pages * P. A negative slot stores
            nothing, as engines pad their batches.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; pools that overlap; on the CPU
            also a slot that the pool does not have. On a GPU such a slot stores nothing.
    """
    _op(k, v, k_pool, v_pool, slot_mapping)


def reference(k, v, k_pool, v_pool, slot_mapping):
    kept = slot_mapping >= 0
    slots, size = slot_mapping[kept], k_pool.shape[2]
    for pool, rows in (k_pool, k), (v_pool, v):
        pool[slots // size, :, slots % size] = rows[kept]


def fake(k, v, k_pool, v_pool, slot_mapping):
    return None


def native(extension: ModuleType, backend: int) -> Callable:
    def run(k, v, k_pool, v_pool, slot_mapping):
        extension.store_slots(backend, k, v, k_pool, v_pool, slot_mapping, raw_stream(k))

    return run


_op = bind(
    "store_slots",
    "(Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor slot_mapping) -> ()",
    reference=reference,
    fake=fake,
    native=native,
    backends=("cpu", "cuda"),
    triton=True,
)
