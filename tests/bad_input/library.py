"""The calls beside models: `kvcomp.plan`, the reasoner's problems, Delethink on an engine."""

import asyncio
import functools
import math
from pathlib import Path

import openai
from transformers import AutoTokenizer

import kvcomp
from bad_input import Attempt, Bad
from kvcomp import Delethink, Delta, reasoner
from kvcomp.hf.shape import shape_of
from kvcomp.plan import DEVICES, Device, plan
from kvcomp.reasoner import task
from kvcomp.testing.models import tiny_model

PROBLEMS = [{"id": "walk", "prompt": task.make_problem(nodes=4, steps=8, seed=0).prompt}]
SHORT = Delethink(chunk=8, carry=4, head=2, max_chunks=3)


def planning(**changed):
    options = {"device": DEVICES["h200"], "methods": [], "context": 4096, **changed}

    def run():
        plan(shape_of(tiny_model("llama").config), **options)

    return lambda: Attempt(run)


def calling(function, *args, **options):
    return lambda: Attempt(lambda: function(*args, **options))


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(reasoner.path())


def client(kind):
    """Of a server that is not there: whatever is sent ends in another error."""
    return kind(base_url="http://127.0.0.1:1/v1", api_key="none", max_retries=0)


def tracing(kind=openai.AsyncOpenAI, **changed):
    options = {"problems": PROBLEMS, "method": SHORT, "model": "m", "log": "log.jsonl", **changed}

    def make():
        found = {"tokenizer": tokenizer(), **options}
        return Attempt(
            lambda: asyncio.run(kvcomp.delethink.trace(client(kind), **found)),
            lambda: sorted(Path().iterdir()),
        )

    return make


def asking(*problems, **changed):
    return tracing(problems=list(problems), **changed)


def reading(text):
    def make():
        Path("problems.jsonl").write_text(text)
        return Attempt(
            lambda: kvcomp.delethink.read_problems("problems.jsonl"),
            lambda: Path("problems.jsonl").read_text(),
        )

    return make


CHAT = [{"role": "user", "content": "x"}]
Sampling = functools.partial(calling, lambda **fields: kvcomp.delethink.Sampling(**fields))
PLAN = [
    Bad(planning(context=0), "plan: context: expected at least 1, got 0"),
    Bad(planning(context=-5), "plan: context: expected at least 1, got -5"),
    Bad(planning(batch=0), "plan: batch: expected at least 1, got 0"),
    Bad(planning(prompt=-1), "plan: prompt: expected at least 0, got -1"),
    Bad(planning(prompt=4096), "prompt: expected fewer tokens than context=4096, got 4096"),
    Bad(planning(context=2**41), "plan: context: expected at most 2.40 = 1099511627776 tokens"),
    Bad(planning(batch=2**29), "batch: expected at most 268435456, .* context=4096, got 536870912"),
    Bad(planning(generate=2**41), "plan: generate: expected at most 2.40 = .*, got 2199023255552"),
    Bad(planning(generate=0), "plan: generate: expected at least 1, got 0"),
    *(
        Bad(planning(device=Device("x", value, 1e9)), "device: expected a bandwidth above 0")
        for value in (0.0, -1.0, math.nan, math.inf)
    ),
    *(
        Bad(planning(device=Device("x", 1e9, value)), "device: expected a memory above 0")
        for value in (0.0, -1.0, math.nan, math.inf)
    ),
    Bad(planning(methods=[Delta(delta_layers=(2, 99))]), "delta_layers: expected .* up to 3"),
    Bad(planning(methods=[Delethink(inner=Delta(delta_layers=(2, 99)))]), "delta_layers: .*99"),
]
REASONER = [
    Bad(calling(task.make_problem, 16, 8, live=1), "reasoner: live: expected 2 to nodes=16, got 1"),
    Bad(calling(task.make_problem, 16, 8, live=17), "reasoner: live: expected 2 to nodes=16, got"),
    *(
        Bad(calling(task.make_problem, nodes, 8), f"reasoner: nodes: expected 2 to 64, got {nodes}")
        for nodes in (1, 65, -3)
    ),
    *(
        Bad(calling(task.make_problem, 16, steps), f"steps: expected at least 1, got {steps}")
        for steps in (0, -1)
    ),
]
TRACE = [
    Bad(asking(), "problems: expected at least one, got none"),
    Bad(asking(*PROBLEMS, *PROBLEMS), "the id 'walk' occurs twice"),
    Bad(asking({"id": 1, "ids": [3]}, {"id": "1", "ids": [4]}), "'1' occurs twice"),
    Bad(asking("from ba"), "number 0: expected a mapping .*'from ba'"),
    Bad(asking({"prompt": "from ba"}), "number 0: id: expected a string or a number, got 'None'"),
    Bad(asking({"id": True, "prompt": "x"}), "number 0: id: expected .* got 'True'"),
    Bad(asking({"id": 1}), "'1': expected one of prompt, messages, ids, got 'None'"),
    Bad(asking({"id": 1, "prompt": "x", "ids": [3]}), "one of prompt, messages, ids, got"),
    Bad(asking({"id": 1, "prompt": ""}), "prompt: expected some text, got ''"),
    Bad(asking({"id": 1, "prompt": ["x"]}), "prompt: expected some text"),
    *(
        Bad(asking({"id": 1, "ids": ids}), "ids: expected a list of token ids")
        for ids in ([], [1, -1], [True], [1.5], "12", 3)
    ),
    Bad(asking({"id": 1, "messages": CHAT}), "messages: expected a tokenizer with a chat template"),
    Bad(tracing(tokenizer=None), "tokenizer: expected one, as problem 'walk' is text"),
    Bad(asking({"id": 1, "ids": [3]}, tokenizer=None, tokens="text"), "tokenizer"),
    Bad(tracing(tokens="words"), "tokens: expected one of auto, ids, text, got 'words'"),
    Bad(tracing(method=Delethink(max_chunks=None)), "max_chunks: expected a number"),
    Bad(tracing(method=Delethink(inner=Delta())), "expected inner=None and reset='prefill'"),
    Bad(tracing(method=Delethink(reset="rotate")), "expected inner=None and reset='prefill'"),
    Bad(tracing(method=Delta()), r"method: expected a kvcomp\.Delethink, got Delta", TypeError),
    Bad(tracing(openai.OpenAI), r"client: expected an openai\.AsyncOpenAI", TypeError),
    Bad(tracing(samples=0), "samples: expected at least 1, got 0"),
    Bad(tracing(concurrency=0), "concurrency: expected at least 1, got 0"),
    Bad(tracing(concurrency=-1), "concurrency: expected at least 1, got -1"),
    Bad(tracing(log="no/such/folder/log.jsonl"), "no/such/folder"),
    Bad(tracing(log="/dev/zero"), "no regular file"),
    Bad(Sampling(temperature=-1), r"Sampling: temperature: .*-1"),
    Bad(Sampling(temperature=math.nan), r"Sampling: temperature: .*nan"),
    Bad(Sampling(temperature=math.inf), r"Sampling: temperature: .*inf"),
    Bad(Sampling(top_p=0), r"Sampling: top_p: .*0"),
    Bad(Sampling(top_p=1.5), r"Sampling: top_p: .*1.5"),
    Bad(Sampling(top_p=math.nan), r"Sampling: top_p: .*nan"),
    *(
        Bad(Sampling(**{field: value}), rf"Sampling: {field}: expected .* got {value!r}")
        for field, values in {
            "temperature": (None, "hot", True),
            "top_p": (None, "1"),
            "top_k": (-2, 0.5, "50"),
            "seed": (1.5, "1", True),
        }.items()
        for value in values
    ),
    Bad(Sampling(extra=[1]), r"Sampling: extra: expected a dict of request fields, got \[1\]"),
    *(
        Bad(Sampling(extra={name: 1}), f"Sampling: extra: '{name}' {why}")
        for name, why in {
            "max_tokens": "is set for every chunk",
            "prompt": "is set for every chunk",
            "seed": "is a field of Sampling",
            "n": "changes the answer",
            "stream": "changes the answer",
        }.items()
    ),
    *(
        Bad(asking({"id": 1, "prompt": text}), "'1': prompt: expected some text")
        for text in ("\ud800", "ba \udfff")
    ),
    Bad(reading('{"id": 1}\n{"id'), "problems.jsonl, line 2: "),
    Bad(reading("[" * 100_000), "problems.jsonl, line 1: "),
    Bad(reading("9" * 5000), "problems.jsonl, line 1: "),
    Bad(reading("\n[1, 2]\n"), "problems.jsonl, line 2: expected an object"),
    Bad(calling(lambda: kvcomp.delethink.read_problems("none.jsonl")), "cannot read .*none.jsonl"),
    Bad(calling(lambda: kvcomp.delethink.read_problems(".")), "cannot read problems"),
]
ROWS = [*PLAN, *REASONER, *TRACE]
