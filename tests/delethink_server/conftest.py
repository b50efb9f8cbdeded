"""The bundled model, alone and behind a stand-in for an engine."""

import threading

import pytest
import torch
from stand_in import PROBLEMS, SHORT, StandIn, trace

from kvcomp import reasoner


@pytest.fixture(scope="session", autouse=True)
def installed():
    pytest.importorskip("transformers")
    pytest.importorskip("openai")


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(reasoner.path())


@pytest.fixture(scope="session")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(reasoner.path(), dtype="auto")


@pytest.fixture(scope="session")
def generate(model):
    """Greedy `generate` on token ids, one at a time; what was asked for before is remembered."""
    known, lock = {}, threading.Lock()

    def call(context, limit):
        key = (tuple(context), limit)
        with lock:
            if key not in known:
                inputs = torch.tensor([context])
                out = model.generate(
                    inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=limit
                )
                known[key] = out[0, len(context) :].tolist()
        return known[key]

    return call


@pytest.fixture
def engine(tokenizer, generate):
    server = StandIn(tokenizer, generate)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(engine, tokenizer, tmp_path):
    """`trace` on the stand-in, with short chunks, and the same log each time."""

    def call(problems=PROBLEMS, method=SHORT, **options):
        options = {"tokenizer": tokenizer, "log": tmp_path / "log.jsonl"} | options
        return trace(engine.url, problems, method, **options)

    return call
