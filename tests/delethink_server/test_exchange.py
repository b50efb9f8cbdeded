"""What a chunk sends to the engine and takes from it."""

import time

import pytest
from stand_in import EOS, LONG, PROBLEMS, SHORT, by_hand, ids_of, outputs

import kvcomp
from kvcomp import Delethink

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "method",
    [
        LONG,
        Delethink(chunk=8, carry=6, head=2, max_chunks=4),  # the carry is longer than a response
        Delethink(chunk=8, carry=4, head=2, max_chunks=3, variant="paper"),
    ],
    ids=lambda method: f"{method.chunk}-{method.carry}-{method.variant}",
)
def test_token_ids_go_both_ways(run, engine, generate, method):
    result = run(method=method)
    assert (result.tokens, result.reason) == ("ids", None) and "exact" in str(result)
    for trace in result.traces:
        assert trace.output == by_hand(generate, trace.prompt, method)
        assert trace.longest_context == len(trace.prompt) + method.most_thought
    work = engine.requests[1:]  # the first one tries the server
    assert len(work) == 2 * method.max_chunks
    assert {each["max_tokens"] for each in work} == {method.chunk, method.chunk - method.carry}
    for request in work:
        assert all(type(token) is int for token in request["prompt"])
        assert request["return_token_ids"] is True
        assert (request["temperature"], request["top_p"], request["top_k"]) == (0, 1, -1)


def test_ids_need_no_tokenizer(run, tokenizer, engine):
    with_text = run()
    given = [{"id": each["id"], "ids": ids_of(tokenizer, each["prompt"])} for each in PROBLEMS]
    before = len(engine.requests)
    assert outputs(run(given, tokenizer=None)) == outputs(with_text)
    assert len(engine.requests) == before  # all of it was in the log


def test_messages_take_the_chat_template(run, engine, tokenizer, monkeypatch):
    template = "<bos> {% for m in messages %}{{ m.content }}{% endfor %} sum 3"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    (found,) = run([{"id": 1, "messages": [{"role": "user", "content": "from ba"}]}]).traces
    assert found.prompt == ids_of(tokenizer, "from ba sum 3")


@pytest.mark.parametrize("where", [2, 7, 8, 11])  # first chunk: tokens 0 to 7, then 4 at a time
def test_the_end_token_ends_a_trace(run, engine, where):
    """At the limit of a chunk too, which engines call "length"."""

    def end(request, answer):
        choice = answer["choices"][0]
        start = {8: 0, 4: 8, 1: -99}[request["max_tokens"]]
        place = where - start
        if 0 <= place < len(choice["token_ids"]):
            choice["token_ids"][place:] = [EOS]
            if place + 1 < request["max_tokens"]:
                choice["finish_reason"] = "stop"
        return answer

    engine.twist = end
    result = run(PROBLEMS[:1])
    (trace,) = result.traces
    assert trace.finish == "eos" and len(trace.output) == where + 1 and trace.output[-1] == EOS
    assert trace.chunks == (1 if where < 8 else 2)
    assert "1 ended by EOS, 0 by the budget" in str(result)


def test_more_chunks_and_samples_go_on_from_the_log(run, engine, generate):
    first = run(PROBLEMS[:1], method=Delethink(chunk=8, carry=4, head=2, max_chunks=1))
    longer = run(PROBLEMS[:1])
    assert longer.resumed == 1 and longer.traces[0].output[:8] == first.traces[0].output
    assert longer.traces[0].output == by_hand(generate, longer.traces[0].prompt, SHORT)
    both = run(samples=2)
    assert both.resumed == 3 and [(t.id, t.sample) for t in both.traces] == [
        (name, sample) for name in ("walk 0", "walk 1") for sample in (0, 1)
    ]
    again = run(PROBLEMS[:1], method=Delethink(chunk=8, carry=4, head=2, max_chunks=1))
    assert again.traces == first.traces  # a smaller budget is a cut


def test_every_chunk_has_a_seed_of_its_own(run, engine, tmp_path):
    sampling = kvcomp.delethink.Sampling(seed=5, extra={"min_p": 0.1})
    drawn = []
    for log in ("one", "two"):
        engine.requests.clear()
        run(sampling=sampling, samples=2, log=tmp_path / log)
        drawn.append({request.get("seed") for request in engine.requests[1:]})
        assert all(request["min_p"] == 0.1 for request in engine.requests[1:])
        assert {request["temperature"] for request in engine.requests} == {0.6}
    assert len(drawn[0]) == 12 and drawn[0] == drawn[1]


@pytest.mark.parametrize("limit", [1, 3])
def test_concurrency_is_bounded(run, engine, limit):
    def wait_for_others(request, answer):
        for _ in range(1000 * (request["max_tokens"] > 1)):
            if engine.busiest >= limit:
                break
            time.sleep(0.03)
        return answer

    engine.twist = wait_for_others
    run(samples=4, concurrency=limit)
    assert engine.busiest == limit


def without_ids(request, answer):
    for name in ("token_ids", "prompt_token_ids"):
        answer["choices"][0].pop(name, None)
    return answer


def reads_a_list_as_text(request, answer):
    if isinstance(request["prompt"], list):  # which is then another prompt
        answer = without_ids(request, answer)
        answer["choices"][0]["token_ids"] = [5] * request["max_tokens"]
        answer["usage"]["prompt_tokens"] = len(str(request["prompt"]))
    return answer


def cuts_the_prompt(request, answer):
    if isinstance(request["prompt"], list):
        answer["choices"][0]["prompt_token_ids"] = request["prompt"][1:]
    return answer


def refuses_lists(request, answer):
    refused = isinstance(request["prompt"], list)
    return (400, {"detail": "prompt must be a string."}) if refused else answer


@pytest.mark.parametrize(
    "twist, why",
    [
        (without_ids, "returned no token ids"),
        (reads_a_list_as_text, "did not read the prompt"),
        (cuts_the_prompt, "did not read the prompt"),
        (refuses_lists, 'HTTP 400: {"detail": "prompt must be a string."}'),
    ],
)
def test_without_exact_ids_it_falls_back_to_text_and_says_so(
    run, engine, generate, tmp_path, twist, why
):
    engine.twist = twist
    with pytest.raises(kvcomp.delethink.EngineError, match=why.split("{")[0]):
        run(tokens="ids", log=tmp_path / "ids.jsonl")
    for _ in range(2):  # the second time, the log says it
        result = run()
        assert result.tokens == "text" and why in result.reason and why in str(result)
        for trace in result.traces:
            assert trace.output == by_hand(generate, trace.prompt, SHORT) and trace.drift == 0
    with pytest.raises(ValueError, match="tokens was 'text' and is 'ids'"):
        run(tokens="ids")


def test_drift_is_counted(run, engine):
    def glue(request, answer):  # two words in one, which the tokenizer does not know
        choice = answer["choices"][0]
        choice["text"] = choice["text"].replace(" ", "", 1)
        return answer

    engine.twist = glue
    result = run(PROBLEMS[:1], tokens="text")
    (trace,) = result.traces
    assert trace.chunks == 3 and len(trace.output) == 16 - 3
    assert trace.drift == 3 and "3 tokens" in str(result).splitlines()[-1]


def test_another_models_tokenizer_is_noticed(run, engine):
    def count(request, answer):
        answer["usage"]["prompt_tokens"] += 5
        return answer

    engine.twist = count
    with pytest.raises(kvcomp.delethink.EngineError, match="is it the model's tokenizer"):
        run(tokens="text")
