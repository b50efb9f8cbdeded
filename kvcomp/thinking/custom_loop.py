"""What loops that replace `generate`'s own, as its `custom_generate`, refuse alike."""

from __future__ import annotations

from typing import Any

from kvcomp.hf.cache import Cache
from kvcomp.hf.chunked_cache import ChunkedCache
from kvcomp.hf.static_cache import StaticCache
from kvcomp.thinking.checks import require

OF_STEPS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def refuse_others(where: str, cache: Any, config: Any, *, chunks: bool) -> None:
    """Raise ValueError unless `generate` decodes one next token per row, into a cache that grows,
    and is asked for no outputs of single steps.

    Args:
        config: the generation config.
        chunks: whether the loop knows Delethink.
    """
    kinds = (Cache, ChunkedCache) if chunks else (Cache,)
    known = isinstance(cache, kinds) and not isinstance(cache, StaticCache)
    without = "max_tokens" if chunks else "max_tokens or Delethink"
    expected = f"a model under kvcomp.patch(model, method), without {without}"
    require(known, where, expected, type(cache).__name__)
    beams = config.num_beams or 1
    require(beams == 1, f"{where}: num_beams", "1", beams)
    wanted = [name for name in OF_STEPS if getattr(config, name, False)]
    require(not wanted, where, "no outputs of single steps, as steps are not single", wanted)
