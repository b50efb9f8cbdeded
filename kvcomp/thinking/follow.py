"""FoReaL (arXiv 2506.06998): a large model leads each sentence, a small one finishes it.

At the start of a sentence the leader leads with a certain probability: it writes the first `lead`
tokens, and the drafter the rest. What one has written the other reads in one forward when it is its
turn. It saves FLOPs, not memory: both models and both caches are held. The paper's rule for the end
of a sentence was not at hand; here it is that of `ends`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcomp.hf.chunked_run import ChunkedRun
from kvcomp.hf.positions import fitting
from kvcomp.hf.run import Run
from kvcomp.hf.static_run import StaticRun
from kvcomp.thinking.checks import is_count, is_number, require, require_texts
from kvcomp.thinking.rows import Sampling, eos_of, generator
from kvcomp.thinking.words import ends_with

ENDS = (".", "?", "!", "\n")


@dataclass
class Followed:
    """What two models have written.

    Attributes:
        text: of the output.
        ids: its tokens.
        led: how many of them are the leader's.
        handovers: times that the other model went on.
    """

    text: str
    ids: list[int]
    led: int
    handovers: int


class _Side:
    """One model and its cache, which may be behind the text."""

    def __init__(self, run: Run) -> None:
        self.run, self.cache = run, run.new_cache()
        self.seen = 0

    def logits(self, ids: Tensor) -> Tensor:
        """[1, vocabulary] behind ids [1, n], of which it reads what it has not read yet."""
        given: dict[str, Any] = {"logits_to_keep": 1}
        given = given if self.run.model._supports_logits_to_keep() else {}
        new = ids[:, self.seen :].to(self.run.model.device)
        with torch.no_grad():
            out = self.run.model(input_ids=new, past_key_values=self.cache, use_cache=True, **given)
        self.seen = ids.shape[1]
        return out.logits[:, -1].float()


def follow_leader(
    leader: Run,
    drafter: Run,
    tokenizer: Any,
    inputs: Any,
    *,
    lead: int = 15,
    gate: float = 1.0,
    ends: tuple[str, ...] = ENDS,
    **sampling: Any,
) -> Followed:
    """Decode one prompt with two patched models that share a tokenizer.

    Args:
        leader, drafter: of `kvcomp.patch`, each with a method of its own, but Delethink.
        tokenizer: of both.
        inputs: "input_ids" [1, n].
        lead: n, tokens of a sentence that the leader writes.
        gate: p, probability that it leads a sentence.
        ends: texts that end a sentence.
        sampling: fields of `Sampling`.

    Raises:
        ValueError: a value out of range, several prompts, one run for both, a run that cannot read
            several tokens at once, or a model that does not know all tokens of the tokenizer.
    """
    where = "follow_leader"
    for name, run in (("leader", leader), ("drafter", drafter)):
        require(isinstance(run, Run), f"{where}: {name}", "what kvcomp.patch returns", run)
        whole = not isinstance(run, (ChunkedRun, StaticRun))
        require(whole, f"{where}: {name}", "a run without Delethink or max_tokens", run.method)
    require(leader is not drafter, f"{where}: drafter", "another run than the leader's", "the same")
    size = len(tokenizer)  # models of one family pad their vocabularies to different sizes
    for name, run in (("leader", leader), ("drafter", drafter)):
        known = run.config.vocab_size
        require(known >= size, f"{where}: {name}", f"a vocabulary of at least {size} tokens", known)
    require_texts(ends, f"{where}: ends")
    require(is_count(lead), f"{where}: lead", "tokens, at least 0", lead)
    require(is_number(gate) and 0 <= gate <= 1, f"{where}: gate", "a probability", gate)
    require(len(inputs["input_ids"]) == 1, f"{where}: inputs", "one prompt", "several")
    drawn = Sampling(**sampling)
    warpers, gates = drawn.warpers(), random.Random(drawn.seed)
    draws = generator(drawn.seed, 0, torch.device("cpu"))
    eos = {*eos_of(leader.model), *eos_of(drafter.model)}
    sides = {True: _Side(leader), False: _Side(drafter)}
    ids = torch.as_tensor(inputs["input_ids"]).cpu()
    most = drawn.max_new_tokens
    for name, run in (("leader", leader), ("drafter", drafter)):
        at = f"kvcomp.thinking: {where}: inputs of the {name}"
        most = fitting(run.model.config, run.method, ids.shape[1], most, at)
    found = Followed("", [], 0, 0)
    leads, before, begins = True, True, True  # the prompt is over, so a sentence begins
    written = 0  # of this sentence
    while len(found.ids) < most and not (found.ids and found.ids[-1] in eos):
        if begins:
            leads, written = gates.random() < gate, 0
        turn = leads and written < lead
        found.handovers += bool(found.ids) and turn != before
        scores = sides[turn].logits(ids)[:, :size].cpu()
        for warper in warpers:
            scores = warper(ids, scores)
        if drawn.temperature:
            token = torch.multinomial(scores.softmax(1), 1, generator=draws)
        else:
            token = scores.argmax(1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        found.ids.append(int(token))
        found.led += turn
        written, before = written + 1, turn
        begins = ends_with(tokenizer, ids, ends)[0]
    found.text = tokenizer.decode(found.ids, skip_special_tokens=True)
    return found
