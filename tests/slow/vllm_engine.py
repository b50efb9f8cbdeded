"""One vLLM engine in a process of its own: reads a job as JSON, prints what came out as JSON.

    {"model": FOLDER, "kvcomp": {...} or null, "prompts": [[ids]], "calls": [[0, 1], [1]],
     "tokens": 32, "engine": {options of vllm.LLM}}

A call generates for the prompts listed, all at once and greedily; calls share the engine and so its
prefix cache. A call may also be

    {"prompts": [0, 1], "abort": 1, "n": 3, FIELD: VALUE}

with other fields of SamplingParams; the request at the place of `abort` in the list is aborted once
all have a few tokens. With n, a prompt has a list of answers instead of one.
"""

from __future__ import annotations

import json
import sys
from typing import Any

FEW = 5  # tokens


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM

    llm = LLM(
        job["model"],
        dtype=job.get("dtype", "float32"),
        enforce_eager=True,
        additional_config={} if job["kvcomp"] is None else {"kvcomp": job["kvcomp"]},
        disable_log_stats=False,
        **job["engine"],
    )
    calls, before = [], 0
    for call in job["calls"]:
        wanted = dict(call) if isinstance(call, dict) else {"prompts": call}
        asked = [{"prompt_token_ids": job["prompts"][i]} for i in wanted.pop("prompts")]
        outputs = run(llm, asked, job["tokens"], wanted.pop("abort", None), wanted)
        total = preemptions(llm)
        calls.append(
            {
                "tokens": [
                    answers[0] if len(answers) == 1 else answers
                    for answers in (
                        [list(answer.token_ids) for answer in output.outputs] for output in outputs
                    )
                ],
                "cached": [output.num_cached_tokens for output in outputs],
                "preemptions": total - before,
            }
        )
        before = total
    result = {"calls": calls, "preemptions": before}
    print("RESULT " + json.dumps(result), flush=True)


def run(llm: Any, asked: list, tokens: int, abort: int | None, fields: dict) -> list:
    """What vLLM returns for each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(
        **{"temperature": 0, "max_tokens": tokens, "ignore_eos": True, **fields}
    )
    if abort is None:
        return llm.generate(asked, params, use_tqdm=False)
    engine, outputs = llm.llm_engine, {}
    names = [f"request-{place}" for place in range(len(asked))]
    for name, prompt in zip(names, asked, strict=True):
        engine.add_request(name, prompt, params)
    aborted = False
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
        begun = [len(output.outputs[0].token_ids) >= FEW for output in outputs.values()]
        if not aborted and len(begun) == len(asked) and all(begun):
            engine.abort_request([names[abort]])
            aborted = True
    return [outputs[name] for name in names]


def preemptions(llm: Any) -> int:
    """So far."""
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return counts["vllm:num_preemptions"]


if __name__ == "__main__":
    main()
