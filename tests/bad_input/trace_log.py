"""Logs of Delethink on a server, each with one thing in it that no run writes."""

import asyncio
import dataclasses
import functools
import json
from pathlib import Path

import openai
from transformers import AutoTokenizer

import kvcomp
from bad_input import Attempt, Bad
from kvcomp import Delethink, reasoner
from kvcomp.delethink import Sampling
from kvcomp.delethink.log import fingerprint

METHOD = Delethink(chunk=8, carry=4, head=2, max_chunks=3)
PROMPT = [5, 6, 7]
SETTINGS = {
    "model": "m",
    "tokens": "ids",
    **{name: getattr(METHOD, name) for name in ("chunk", "carry", "head", "variant")},
    **dataclasses.asdict(Sampling()),
}
HASH = fingerprint(SETTINGS, PROMPT)
FIRST = {"kvcomp.delethink": 1, "settings": SETTINGS, "reason": None}


def record(chunk, **changed):
    ids = list(range(8 if chunk == 0 else 4))
    context = len(PROMPT) + 8  # the carry and the new tokens, after the first chunk
    known = {"id": "a", "sample": 0, "chunk": chunk, "hash": HASH, "finish": "length"}
    return {**known, "context": context, "drift": 0, "ids": ids, **changed}


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(reasoner.path())


def resuming(*lines):
    """A run that goes on from a log with those lines, on a server that is not there."""

    def make():
        log = Path("log.jsonl")
        log.write_text(
            "".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in lines)
        )
        client = openai.AsyncOpenAI(base_url="http://127.0.0.1:1/v1", api_key="none", max_retries=0)
        run = kvcomp.delethink.trace(
            client, [{"id": "a", "ids": PROMPT}], METHOD, model="m", log=log, tokenizer=tokenizer()
        )
        return Attempt(lambda: asyncio.run(run), log.read_bytes)

    return make


def without(line, key):
    return {name: value for name, value in line.items() if name != key}


VALUES = {  # field -> values that no run writes, and what the error says was expected
    "id": ([None, 3, ["a"]], "text"),
    "sample": ([None, "0", -1, 0.0, True, [0]], "a number of at least 0"),
    "chunk": ([None, "1", -1, 1.0, True, []], "a number of at least 0"),
    "hash": ([None, 7, []], "text"),
    "finish": ([None, "eos", "abort", 1, "", ["stop"]], "stop or length"),
    "context": ([None, "x", "11", -1, 11.0, True, {}], "a number of at least 0"),
    "drift": ([None, "0", -1, 0.5, False], "a number of at least 0"),
    "ids": ([None, "text", {}, 3], "a list of token ids"),
}
TOKENS = [["a"], [None], [-1], [1.5], [True], [[3]], [3, 4, 5, "6"]]
HEADERS = [
    (FIRST | {"settings": ["model", "m"]}, "settings: expected an object"),
    (FIRST | {"settings": "all"}, "settings: expected an object"),
    (FIRST | {"settings": None}, "settings: expected an object"),
    (FIRST | {"settings": {}}, "settings: tokens: expected ids or text, got None"),
    (
        FIRST | {"settings": SETTINGS | {"tokens": ["ids"]}},
        "settings: tokens: expected ids or text",
    ),
    (
        FIRST | {"settings": SETTINGS | {"tokens": "words"}},
        "settings: tokens: expected ids or text",
    ),
    (FIRST | {"reason": 3}, "reason: expected text or null, got 3"),
    (FIRST | {"kvcomp.delethink": 2}, "version: expected 1, got 2"),
    (FIRST | {"kvcomp.delethink": True}, "version: expected 1, got True"),
    (FIRST | {"kvcomp.delethink": "1"}, "version: expected 1, got '1'"),
    (without(FIRST, "settings"), "line: expected an object with kvcomp.delethink, settings"),
    (FIRST | {"more": 1}, "line: expected an object with kvcomp.delethink, settings"),
]
UNFIT = {  # each well-formed, and not what the request can have brought
    "context": 12,
    "drift": 1,
    "ids": [1, 2, 3],
}


def damaged(line, match):
    return rf"^kvcomp\.delethink: log\.jsonl, line {line} is damaged: {match}"


ROWS = [
    *(Bad(resuming(line), damaged(1, match)) for line, match in HEADERS),
    *(
        Bad(
            resuming(FIRST, record(0), record(1) | {field: value}),
            damaged(3, f"{field}: expected {expected}"),
        )
        for field, (values, expected) in VALUES.items()
        for value in values
    ),
    *(
        Bad(resuming(FIRST, record(0, ids=ids)), damaged(2, "ids: expected token ids, got"))
        for ids in TOKENS
    ),
    *(
        Bad(resuming(FIRST, line), damaged(2, "line: expected an object with id, sample, chunk"))
        for line in ("3", "null", "[]", '"x"', "{}", without(record(0), "ids"), record(0, more=1))
    ),
    Bad(resuming(FIRST, "[" * 100_000), damaged(2, "")),
    Bad(resuming(FIRST, "9" * 5000), damaged(2, "")),
    Bad(resuming(FIRST, ""), damaged(2, "")),
    Bad(resuming(FIRST, record(1)), damaged(2, "chunk 1 of 'a' follows 0 others")),
    Bad(resuming(FIRST, record(0), record(0)), damaged(3, "chunk 0 of 'a' follows 1 others")),
    Bad(
        resuming(FIRST, record(0, finish="stop"), record(1)),
        damaged(3, "chunk 1 of 'a' follows the end of its trace"),
    ),
    Bad(resuming(FIRST, record(0, hash="0" * 16)), "the prompt of problem 'a' is not the one"),
    *(
        Bad(
            resuming(FIRST, record(0), record(1) | {field: value}),
            "chunk 1 of 'a', sample 0 is damaged",
        )
        for field, value in UNFIT.items()
    ),
]
