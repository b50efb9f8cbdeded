"""Chunks and problems that do not fit the context of the server."""

import pytest
from stand_in import PROBLEMS, SHORT, by_hand, chunks_in, ids_of

import kvcomp
from kvcomp import reasoner

pytestmark = pytest.mark.usefixtures("one_thread")


def needed(tokenizer):
    return [len(ids_of(tokenizer, each["prompt"])) + SHORT.most_thought for each in PROBLEMS]


def test_the_test_of_a_server_leaves_out_extra_fields(run, engine):
    """vLLM refuses a request whose min_tokens exceed its max_tokens, 1 in that test."""

    def at_least(request, answer):
        if request.get("min_tokens", 0) > request["max_tokens"]:
            return 400, {"error": {"message": "min_tokens must be at most max_tokens"}}
        return answer

    engine.twist = at_least
    result = run(sampling=kvcomp.delethink.Sampling(temperature=0, extra={"min_tokens": 4}))
    assert len(result.traces) == 2 and result.tokens == "ids"
    assert [request.get("min_tokens") for request in engine.requests] == [None] + 6 * [4]


def test_a_chunk_longer_than_the_context_is_found_before_the_work(
    run, engine, tokenizer, generate, tmp_path
):
    engine.max_model_len = min(needed(tokenizer)) - 1
    engine.tell_context()
    with pytest.raises(kvcomp.delethink.EngineError) as caught:
        run()
    prompt = engine.max_model_len + 1 - SHORT.most_thought
    assert f"a prompt of {prompt} tokens and a chunk of 8 need {prompt + 8}" in str(caught.value)
    assert f"(max_model_len) is {engine.max_model_len}" in str(caught.value)
    assert len(engine.requests) == 1 and chunks_in(tmp_path / "log.jsonl") == 0

    engine.max_model_len = max(needed(tokenizer))  # just enough
    engine.tell_context()
    for trace in run().traces:
        assert trace.output == by_hand(generate, trace.prompt, SHORT)
    engine.max_model_len = 1
    engine.tell_context()
    assert run().resumed == 6  # nothing is left to ask for


def test_a_problem_longer_than_the_context_is_not_sent(run, engine, tokenizer):
    long = {"id": "long", "prompt": " ".join([PROBLEMS[0]["prompt"]] * 2)}
    engine.max_model_len = max(needed(tokenizer))
    engine.tell_context()
    with pytest.raises(kvcomp.delethink.TraceError, match="1 of 3 traces failed, 2 were") as caught:
        run([long, *PROBLEMS])
    assert "max_model_len" in str(caught.value.failures["long", 0])
    assert len(engine.requests) == 1 + 6


@pytest.mark.parametrize(
    "models",
    [
        {"object": "list", "data": []},
        {"object": "list", "data": None},
        {"object": "list", "data": [3, None]},
        {"object": "list", "data": [{"id": reasoner.path()}]},
        {"object": "list", "data": [{"id": reasoner.path(), "max_model_len": None}]},
        {"object": "list", "data": [{"id": reasoner.path(), "max_model_len": "4"}]},
        {"object": "list", "data": [{"id": reasoner.path(), "max_model_len": 0}]},
        {"object": "list", "data": [{"id": "another", "max_model_len": 1}]},
        "<html>hello</html>",
        [],
    ],
    ids=str,
)
def test_a_server_that_does_not_tell_its_context_is_used(run, engine, models):
    engine.models = models
    assert len(run().traces) == 2


def clip(room):
    """What vLLM does with a max_tokens that it has no room for: fewer tokens, no error."""

    def twist(request, answer):
        new = answer["choices"][0]["token_ids"][: room(request)]
        answer["choices"][0]["token_ids"] = new
        answer["usage"]["completion_tokens"] = len(new)
        return answer

    return twist


@pytest.mark.parametrize("tokens", ["ids", "text"])
def test_a_server_that_clips_max_tokens(run, engine, tokenizer, tokens, tmp_path):
    prompt = min(needed(tokenizer)) - SHORT.most_thought
    engine.twist = clip(lambda request: max(prompt + 6 - len(request["prompt"]), 1))
    if tokens == "text":
        engine.twist = lambda request, answer: clip_text(answer, 6, tokenizer)
    with pytest.raises(kvcomp.delethink.TraceError) as caught:
        run(PROBLEMS[:1], tokens=tokens)
    assert "after 6 of 8 tokens: is its context shorter than the" in str(caught.value)
    assert chunks_in(tmp_path / "log.jsonl") == 0


def clip_text(answer, limit, tokenizer):
    words = answer["choices"][0]["text"].split()[:limit]
    answer["choices"][0]["text"] = " ".join(words)
    answer["usage"]["completion_tokens"] = len(words)
    return answer


def test_a_limit_on_new_tokens_is_not_called_a_short_context(run, engine):
    """Its context is known and long enough, so something else cut the answer."""
    engine.tell_context()
    engine.twist = clip(lambda request: 6)
    with pytest.raises(kvcomp.delethink.TraceError) as caught:
        run(PROBLEMS[:1])
    assert "after 6 of 8 tokens, although its context of 4096 has room" in str(caught.value)
    assert "max_new_tokens" in str(caught.value)
