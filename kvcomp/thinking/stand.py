"""STAND: speculation without a draft model, from what the model itself has said (arXiv 2506.04708).

A thought repeats itself. So the model's own next-token distributions, kept by the last 4, 3 or 2
tokens, draft the next ones, and one forward checks them all. The tokens are those of decoding
without, greedy or drawn by noise (see `noise`), under every method that can check drafts.

Departures from the paper: a chain of drafts, where it has a tree tuned on samples; a draft is kept
where the check draws the very same token from the same noise, where the paper accepts by rejection
sampling; and the number of drafts in a forward is the one that wins most tokens per second, by
what forwards have taken so far and drafts have won, down to none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from kvcomp.hf.chunked_cache import ChunkedCache
from kvcomp.hf.drafting import refuse_processors
from kvcomp.hf.rotation import changes_with_length
from kvcomp.ops.append_attention import MOST_QUERIES
from kvcomp.thinking.checks import is_count, is_number, require
from kvcomp.thinking.custom_loop import refuse_others
from kvcomp.thinking.drafts import Drafter
from kvcomp.thinking.draws import Looking
from kvcomp.thinking.loop import Decoding
from kvcomp.thinking.ngrams import NgramTable
from kvcomp.thinking.noise import GumbelNoise

MOST_DRAFTS = MOST_QUERIES - 1


class Stand:
    """Decode several tokens in a forward: `model.generate(**inputs, custom_generate=Stand())`.

    The table of n-grams stays from call to call, for further samples of one question.

    Args:
        orders: lengths of the contexts that are looked up, the longest first.
        top: tokens of an entry.
        depth: drafts in a forward, at most.
        sure: a chain of drafts ends where the product of their probabilities falls below this.
        seed: of the draws, where `generate` samples.
        streamer: gets the tokens of a single row. `generate` keeps its own from a
            `custom_generate`, so give it to both.
        adapt: check as many drafts as pay, see `pace`, which may be none. The tokens are the same.
        together: whether all rows of a batch take the same number of drafts. Else each takes those
            that are right, where the method allows it; that is faster, and leaves gaps in a cache,
            so that no further turn can go on with it. None: only where a cache is given, or given
            back.

    Raises:
        ValueError: a value out of range.
    """

    replaces_loop = True  # of `generate`, as its `custom_generate`

    def __init__(
        self,
        *,
        orders: tuple[int, ...] = (4, 3, 2, 1),
        top: int = 10,
        depth: int = 7,
        sure: float = 0.1,
        seed: int = 0,
        streamer: Any = None,
        adapt: bool = True,
        together: bool | None = None,
    ) -> None:
        good = (
            isinstance(orders, tuple | list) and len(orders) and all(is_count(n, 1) for n in orders)
        )
        require(bool(good), "Stand: orders", "lengths of at least 1 token", orders)
        require(is_count(top, 1), "Stand: top", "at least 1 token", top)
        drafts = is_count(depth, 1) and depth <= MOST_DRAFTS
        require(drafts, "Stand: depth", f"at least 1 draft, at most {MOST_DRAFTS}", depth)
        require(is_number(sure) and 0 <= sure <= 1, "Stand: sure", "a probability", sure)
        require(isinstance(adapt, bool), "Stand: adapt", "True or False", adapt)
        known = together is None or isinstance(together, bool)
        require(known, "Stand: together", "True, False or None", together)
        self.table = NgramTable(sorted(orders, reverse=True), top)
        self.drafter = Drafter(self.table, depth=depth, sure=sure)
        self.adapt, self.together = adapt, together
        self.noise, self.streamer = GumbelNoise(seed), streamer
        self._words: int | None = None  # in the vocabulary that the table is about

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate(custom_generate=...)` calls: [B, tokens] ids, or an output with them.

        Raises:
            ValueError: a model that is not patched, beams, outputs of single steps, a method under
                which drafts cannot be checked, or a logits processor that remembers the steps
                before, unless it is one of ours (`Looking`); before anything is decoded.
        """
        cache: Any = model_kwargs.get("past_key_values")
        streamer = self.streamer if streamer is None else streamer
        _refuse(model, cache, generation_config)
        refuse_processors([p for p in logits_processor if not isinstance(p, Looking)])
        words = model.config.get_text_config(decoder=True).vocab_size
        if self._words != words:
            self.table.clear()
        self._words = words
        decoding = Decoding(
            self, model, input_ids, logits_processor, stopping_criteria, generation_config
        )
        try:
            decoding.run(cache, streamer, model_kwargs)
        except BaseException:
            cache.drop_drafts()
            raise
        sequences = decoding.sequences()
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return sequences
        ids: Any = sequences  # by its annotation a LongTensor, which no tensor is
        return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cache)


def _refuse(model: Any, cache: Any, config: Any) -> None:
    """Raise ValueError, with the reason, for what `Stand` cannot do."""
    refuse_others("Stand", cache, config, chunks=True)
    context = cache.context if isinstance(cache, ChunkedCache) else cache
    method: Any = context.kv.method
    if (reason := context.drafts_refused) is not None:
        raise ValueError(
            f"kvcomp.thinking: Stand: {method.name} cannot check several tokens at once: {reason}"
        )
    if changes_with_length(model):
        raise ValueError(
            f"kvcomp.thinking: Stand: {type(model).__name__} changes its rotary frequencies with"
            " the length, which drafts may cross"
        )
