"""What `patch(kv=...)` asks for, and who cannot have it."""

from __future__ import annotations

from typing import Any

from kvcomp.cache.rows import KINDS, EightBits
from kvcomp.hf.latent import latent_rank
from kvcomp.hf.refusals import head_sizes


def eight_bits(model: Any, kv: str, kv_rotate: bool | None) -> EightBits | None:
    """How a run keeps K and V; None: as the model makes them.

    Args:
        kv: "model" or "int8".
        kv_rotate: see `kvcomp.patch`.

    Raises:
        TypeError: `kv_rotate` is neither None nor a bool.
        ValueError: another kind, or a model that cannot have it.
    """
    if kv_rotate is not None and not isinstance(kv_rotate, bool):
        raise TypeError(f"kvcomp.patch: kv_rotate: expected True, False or None, got {kv_rotate!r}")
    if kv == "fp8":
        raise ValueError(
            "kvcomp.patch: kv: expected 'model' or 'int8', got 'fp8': no kernel here multiplies it,"
            " and at the same bytes it errs ten times as much as int8"
        )
    if kv not in KINDS:
        raise ValueError(f"kvcomp.patch: kv: expected 'model' or 'int8', got {kv!r}")
    if kv == "model":
        if kv_rotate:
            raise ValueError("kvcomp.patch: kv_rotate: expected None with kv='model', got True")
        return None
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if latent_rank(config) is not None:
        raise ValueError(
            f"kvcomp.patch: kv: expected 'model' for {name}, which caches latents, got 'int8'"
        )
    if any(k != v for k, v in head_sizes(config)):
        raise ValueError(
            f"kvcomp.patch: kv: expected 'model' for {name}, whose keys and values differ in size,"
            " got 'int8'"
        )
    odd = [dim for dim, _ in head_sizes(config) if dim & (dim - 1)]
    power = not odd
    if kv_rotate and not power:
        raise ValueError(
            f"kvcomp.patch: kv_rotate: expected False or None for {name}, whose head size of"
            f" {odd[0]} is no power of two, got True"
        )
    return EightBits(turn=power if kv_rotate is None else kv_rotate)
