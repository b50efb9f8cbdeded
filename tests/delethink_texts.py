"""Questions and outputs for Delethink, and slow readings of what it makes of them."""

import torch

from kvcomp import Delethink
from slow import delethink as slow

NEVER = 1000  # an EOS that no model here can say
SHORT = {"chunk": 13, "carry": 6, "head": 2, "max_chunks": None}
SCHEDULES = {
    "carry-below-half": (17, 7, 3, "exact_bound"),
    "carry-half": (16, 8, 0, "exact_bound"),
    "carry-over-half": (13, 10, 4, "exact_bound"),
    "carry-1": (11, 1, 0, "exact_bound"),
    "carry-2": (11, 2, 0, "exact_bound"),  # one token to encode
    "head-all-but-one": (12, 6, 5, "exact_bound"),
    "paper": (17, 7, 3, "paper"),
    "paper-no-head": (15, 10, 0, "paper"),
    "paper-overlap": (10, 8, 5, "paper"),  # the carry begins within the head
    "paper-head-all-but-one": (9, 4, 8, "paper"),
}


def method_of(schedule, **fields):
    chunk, carry, head, variant = SCHEDULES[schedule]
    given = {"max_chunks": None, "chunk": chunk, "carry": carry, "head": head, "variant": variant}
    return Delethink(**given | fields)


def ragged(*lens, seed=1):
    """A left-padded batch of prompts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (len(lens), max(lens)), generator=generator)
    mask = torch.stack([torch.arange(max(lens)) >= max(lens) - n for n in lens]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def questions(batch):
    """Each row by itself, without its padding: [1, n]."""
    pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [ids[valid][None] for ids, valid in pairs]


def generate(model, batch, tokens, **options):
    """The output alone, [B, n]."""
    given = {"do_sample": False, "eos_token_id": NEVER, "max_new_tokens": tokens, **options}
    return model.generate(**batch, **given)[:, batch["input_ids"].shape[1] :]


def slow_greedy(model, method, batch, tokens):
    respond = slow.stock(model, do_sample=False, eos_token_id=NEVER)
    return torch.cat([slow.think(method, row, respond, tokens) for row in questions(batch)])


def dictate(model, run, batch, output, each_step=lambda cache, step: None, cache=None):
    """Logits [B, n, V] of a loop of one's own in which the model is told what to say."""
    cache = run.new_cache() if cache is None else cache
    with torch.no_grad():
        found = [model(**batch, past_key_values=cache).logits[:, -1:]]
        each_step(cache, 0)
        for step, token in enumerate(output[:, :-1].split(1, 1), 1):
            found.append(model(token, past_key_values=cache).logits)
            each_step(cache, step)
    return torch.cat(found, 1)


def some_output(rows, tokens):
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(5))


def slow_logits(method, batch, output, forward):
    rows = zip(questions(batch), output.split(1), strict=True)
    return torch.cat([slow.logits(method, question, own, forward) for question, own in rows])


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
