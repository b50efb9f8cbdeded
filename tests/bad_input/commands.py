"""The command line: exit code 2, one line on standard error, nothing on standard output."""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

from transformers import AutoConfig

from bad_input import Attempt, Bad
from kvcomp import cli
from kvcomp.reasoner import task
from kvcomp.testing.models import tiny_model

PROBLEM = {"id": "walk", "prompt": task.make_problem(nodes=4, steps=8, seed=0).prompt}
LINE = json.dumps(PROBLEM) + "\n"
FILES = {
    "good.jsonl": LINE,
    "broken.jsonl": LINE + "{",
    "list.jsonl": LINE + "[1]\n",
    "empty.jsonl": "\n",
    "twice.jsonl": LINE * 2,
    "nameless.jsonl": '{"prompt": "x"}\n',
    "silent.jsonl": '{"id": 1}\n',
    "damaged.jsonl": '{"kvcomp.delethink":1,"settings":[],"reason":null}\n',
    "halves.jsonl": '{"id": 1, "ids": [1.5]}\n',
    "broken/config.json": "{",
    "bare/readme.md": "no config here",
}
UNPLANNED = {  # -> why
    "mamba": "names no attention heads",
    "t5": "cannot build",
}


class OneLine(Exception):
    """What a command has said before it ended with exit code 2."""


def calling(*args):
    """A command line in a folder that has FILES, all of which stay as they are."""

    def run():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([str(arg) for arg in args])
        assert (code, out.getvalue()) == (2, "")
        assert err.getvalue().endswith("\n")
        raise OneLine(err.getvalue()[:-1])

    def make():
        for name, text in FILES.items():
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text(text)
        return Attempt(run, files)

    return make


def reading_from(stdin):
    """`kvcomp generate --prompt -` with another standard input."""

    def make():
        ours, sys.stdin = sys.stdin, stdin()
        attempt = calling("generate", "reasoner", "--prompt", "-")()

        def close():
            if sys.stdin is not None:
                sys.stdin.close()
            sys.stdin = ours

        return Attempt(attempt.run, attempt.state, close)

    return make


def text_of(data, errors="strict"):
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors=errors)


def unreadable():
    return io.TextIOWrapper(io.FileIO(os.open(os.devnull, os.O_WRONLY), "w"), encoding="utf-8")


def closed():
    stream = io.StringIO("x")
    stream.close()
    return stream


def files():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def planning(kind):
    def make():
        config_of(kind).save_pretrained(kind)
        return calling("plan", f"./{kind}", "--device", "h200")()

    return make


def config_of(kind):
    if kind == "mamba":
        return AutoConfig.for_model("mamba", num_hidden_layers=2, hidden_size=64)
    return AutoConfig.for_model("t5") if kind == "t5" else tiny_model(kind).config


def tracing(changed):
    options = {"--url": "http://127.0.0.1:1/v1", "--model": "served", "--tokenizer": "reasoner"}
    options |= {"--problems": "good.jsonl", "--log": "log.jsonl", "--retries": 0}
    options |= {"--chunk": 8, "--carry": 4, "--head": 2} | changed
    return calling("delethink", *(part for pair in options.items() for part in pair))


GENERATE = [
    ("./no-such-model --prompt x", "./no-such-model"),
    ("reasoner --prompt x --method magic", "--method: expected one of .* got 'magic'"),
    ("reasoner --prompt x --budget 100", "multiple of page_size=8, got 100"),
    ("reasoner --prompt x --budget 16", "72 tokens"),
    ("reasoner --prompt x --budget -64", "budget: expected .* got -64"),
    ("reasoner --prompt x --budget 0", "budget: expected .* got 0"),
    ("reasoner --prompt x --budget many", "--budget"),
    ("reasoner --prompt x --method full --budget 64", "--budget: method 'full' has none"),
    ("reasoner --prompt x --chunk 64", "--chunk: method 'delta' has none"),
    ("reasoner --prompt x --inner full", "--inner: method 'delta' has none"),
    ("reasoner --prompt x --method delethink --inner magic", "'magic'"),
    ("reasoner --prompt x --method delethink --inner delethink", "inner: expected another method"),
    ("reasoner --prompt x --method delethink --chunk 8 --carry 8", "more than carry=8"),
    ("reasoner --prompt x --set speed=9", "'delta' has no field 'speed'; it has: budget"),
    ("reasoner --prompt x --set recent=few", "--set recent=few: expected a value of type int"),
    ("reasoner --prompt x --set recent", "--set recent: expected a value of type int"),
    ("reasoner --prompt x --set page_size=2.5", "--set page_size=2.5: expected"),
    ("reasoner --prompt x --set delta_layers=2,99", "99"),
    ("reasoner --prompt x --set delta_layers=2,x", "--set delta_layers=2,x: expected"),
    ("reasoner --prompt x --method louis-kv --set tau=nan", "tau: expected .* got nan"),
    ("reasoner --prompt x --method louis-kv --set audit=7", "--set audit=7: expected .*bool"),
    ("reasoner --prompt x --method lazy-eviction --set alpha=inf", "alpha: expected a probability"),
    (
        "reasoner --prompt x --method lazy-eviction --set h1=theirs",
        "h1: expected one of patient, paper, code",
    ),
    ("reasoner --prompt", "--prompt"),
    ("reasoner", "--prompt"),
    ("reasoner --prompt x --device abacus", "--device: expected cpu, cuda .* got 'abacus'"),
    ("reasoner --prompt x --device meta", "--device: expected cpu, cuda .* got 'meta'"),
    ("reasoner --prompt x --dtype int3", "--dtype: expected one of float32.* got 'int3'"),
    ("reasoner --prompt x --max-new-tokens 0", "--max-new-tokens"),
    ("reasoner --prompt x --temperature -1", "--temperature"),
    ("reasoner --prompt x --temperature nan", "--temperature"),
    ("reasoner --prompt x --temperature inf", "--temperature: expected a number, got inf"),
    ("reasoner --prompt x --top-p 2", "--top-p"),
    ("reasoner --prompt x --top-p nan", "--top-p"),
    ("reasoner --prompt x --seed some", "--seed"),
    ("reasoner --prompt x --seed -1", "--seed"),
    ("reasoner --prompt x --seed 4294967296", "--seed"),
    ("reasoner --prompt \udcff", "--prompt: expected UTF-8 text, got other bytes"),
]
PLAN = [
    ("./no-such-model --device h200", "./no-such-model"),
    (f"./{'x' * 300} --device h200", "cannot load config './x*': no such folder"),
    ("./bare --device h200", "cannot load config './bare'"),
    ("./broken --device h200", "cannot load config './broken'"),
    ("reasoner --device abacus", "--device: expected one of h200.* got 'abacus'"),
    ("reasoner --device cuda:99", "no GPU 'cuda:99'"),
    ("reasoner --device h200 --method magic", "'magic'"),
    ("reasoner --device h200 --context 0", "--context"),
    ("reasoner --device h200 --context -5", "--context"),
    ("reasoner --device h200 --batch many", "--batch"),
    ("reasoner --device h200 --batch 0", "--batch"),
    ("reasoner --device h200 --generate 0", "--generate"),
    ("reasoner --device h200 --memory -3", "--memory: expected a number above 0, got -3"),
    ("reasoner --device h200 --bandwidth nan", "--bandwidth: expected a number above 0, got nan"),
    ("reasoner --device h200 --weights 0", "--weights: expected a number above 0, got 0"),
    ("reasoner --device h200 --weights inf", "--weights: expected a number above 0, got inf"),
    ("reasoner --device h200 --bandwidth inf", "--bandwidth: expected a number above 0, got inf"),
    ("reasoner --device h200 --memory inf", "--memory: expected a number above 0, got inf"),
    ("reasoner --device h200 --dtype int3", "int3"),
    ("reasoner --device h200 --prompt-tokens 99999", "99999"),
    ("reasoner --device h200 --prompt-tokens -1", "--prompt-tokens"),
    ("reasoner --device h200 --method full --budget 9", "--budget: none of full has one"),
    ("reasoner --device h200 --budget 100", "page_size=8"),
    ("reasoner --device h200 --set speed=9", "speed"),
    ("reasoner --device h200 --set delta.speed=9", "speed"),
    ("reasoner --device h200 --set delta_layers=2,99", "99"),
]
OTHERS = [
    ("demo --method magic", "magic"),
    ("demo --budget 6", "page_size=4"),
    ("demo --nodes 999", "--nodes"),
    ("demo --nodes 1", "--nodes"),
    ("demo --problems 0", "--problems"),
    ("demo --seed -1", "--seed"),
    ("demo --steps 9999", "9999"),
    ("demo --json no/such/folder/x.json", "cannot write 'no/such/folder/x.json': No such file"),
    ("demo --plot bare", "cannot write 'bare': Is a directory"),
    ("demo --plot good.jsonl/x.png", "cannot write 'good.jsonl/x.png': Not a directory"),
    (f"demo --json {'x' * 300}", "cannot write 'x*': File name too long"),
    ("demo --json /proc/kvcomp.json", "cannot write '/proc/kvcomp.json'"),
    ("demo --json x.json --plot ./x.json", "--plot: expected another file than --json"),
    ("info --dance", "--dance"),
    ("info extra", "extra"),
    ("dance", "dance"),
]
TRACE = [
    ({"--carry": 8}, "more than carry=8"),
    ({"--chunk": 0}, "chunk: expected more than carry=4 tokens, got 0"),
    ({"--head": -1}, "head: expected fewer than carry=4"),
    ({"--max-chunks": 0}, "max_chunks: expected at least 1"),
    ({"--url": "127.0.0.1:1"}, "--url: expected http://... or https://..., got '127.0.0.1:1'"),
    ({"--problems": "missing.jsonl"}, "missing.jsonl"),
    ({"--problems": "broken.jsonl"}, "broken.jsonl, line 2"),
    ({"--problems": "list.jsonl"}, "list.jsonl, line 2: expected an object"),
    ({"--problems": "empty.jsonl"}, "at least one"),
    ({"--problems": "twice.jsonl"}, "'walk' occurs twice"),
    ({"--problems": "nameless.jsonl"}, "number 0: id: expected a string or a number"),
    ({"--problems": "silent.jsonl"}, "problem '1': expected one of prompt, messages, ids"),
    ({"--problems": "halves.jsonl"}, "problem '1': ids: expected a list of token ids"),
    ({"--log": "no/such/folder/log.jsonl"}, "no/such/folder"),
    ({"--log": "twice.jsonl"}, "not a log of Delethink"),
    ({"--log": "damaged.jsonl"}, "damaged.jsonl, line 1 is damaged: settings: expected an object"),
    ({"--out": "no/such/folder/out.jsonl"}, "no/such/folder"),
    ({"--out": "bare"}, "cannot write 'bare': Is a directory"),
    ({"--out": "good.jsonl"}, "--out: expected another file than --problems, got 'good.jsonl'"),
    ({"--out": "./new.jsonl", "--log": "new.jsonl"}, "--out: expected another file than --log"),
    ({"--tokens": "words"}, "tokens: expected one of auto, ids, text, got 'words'"),
    ({"--extra": "[1]"}, "--extra: expected a JSON object"),
    ({"--extra": "{"}, "--extra: expected a JSON object"),
    ({"--tokenizer": "./nowhere"}, "./nowhere"),
    ({"--temperature": -1}, "temperature"),
    ({"--temperature": "nan"}, "temperature"),
    ({"--top-p": 0}, "top_p"),
    ({"--samples": 0}, "samples: expected at least 1, got 0"),
    ({"--concurrency": 0}, "concurrency: expected at least 1, got 0"),
    ({"--retries": -1}, "--retries"),
    ({"--timeout": -1}, "--timeout: expected seconds above 0, got -1"),
    ({"--timeout": "nan"}, "--timeout: expected seconds above 0, got nan"),
]


def said(match):
    return f"^kvcomp: error: .*{match}"


ROWS = [
    *(Bad(calling("generate", *words.split()), said(m), OneLine) for words, m in GENERATE),
    Bad(calling("generate", "reasoner", "--prompt", " "), said("--prompt: .*some text"), OneLine),
    *(
        Bad(reading_from(stdin), said(f"--prompt: {match}"), OneLine)
        for stdin, match in (
            (lambda: None, "standard input is closed"),
            (closed, "standard input is closed"),
            (lambda: text_of(b"ab\xff"), "cannot read standard input: 'utf-8' codec can't decode"),
            (lambda: text_of(b"ab\xff", "surrogateescape"), "expected UTF-8 text, got other bytes"),
            (lambda: text_of(b" \n"), "expected some text, got none"),
            (
                unreadable,
                "cannot read standard input: not readable",
            ),
        )
    ),
    *(Bad(calling("plan", *words.split()), said(match), OneLine) for words, match in PLAN),
    *(Bad(planning(kind), said(why), OneLine) for kind, why in UNPLANNED.items()),
    *(Bad(calling(*words.split()), said(match), OneLine) for words, match in OTHERS),
    *(Bad(tracing(changed), said(re.escape(text)), OneLine) for changed, text in TRACE),
]
