"""One vLLM engine in a process of its own: reads a job as JSON, prints what came out as JSON.

    {"model": FOLDER, "kvcomp": {...} or null, "prompts": [[ids]], "calls": [[0, 1], [1]],
     "tokens": 32, "engine": {options of vllm.LLM}}

A call generates for the prompts listed, greedily and all at once; calls share the engine and so its
prefix cache.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["model"],
        dtype=job.get("dtype", "float32"),
        enforce_eager=True,
        additional_config={} if job["kvcomp"] is None else {"kvcomp": job["kvcomp"]},
        disable_log_stats=False,
        **job["engine"],
    )
    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    calls = []
    for call in job["calls"]:
        asked = [{"prompt_token_ids": job["prompts"][index]} for index in call]
        outputs = llm.generate(asked, greedy, use_tqdm=False)
        calls.append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "cached": [output.num_cached_tokens for output in outputs],
            }
        )
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    result = {"calls": calls, "preemptions": counts["vllm:num_preemptions"]}
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
