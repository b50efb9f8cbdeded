"""One engine with a small pool: the most requests that it decodes together without a preemption.

Reads a job as JSON from standard input, prints the number as JSON.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["model"],
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=job["prompt"] + job["tokens"],
        max_num_seqs=64,
        enable_prefix_caching=False,
        disable_log_stats=False,
        additional_config={} if job["kvcomp"] is None else {"kvcomp": job["kvcomp"]},
        **job["engine"],
    )
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)

    def preempts(count: int) -> bool:
        prompts = [
            {"prompt_token_ids": [3 + (row * 31 + i * 7) % 200 for i in range(job["prompt"])]}
            for row in range(count)
        ]
        before = preemptions()
        llm.generate(prompts, sampling, use_tqdm=False)
        return preemptions() > before

    def preemptions() -> int:
        values = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        return values["vllm:num_preemptions"]

    most = job["first"]
    if preempts(most):
        raise SystemExit(f"already {most} requests are preempted")
    while not preempts(most + 1):
        most += 1
    print("RESULT " + json.dumps(most), flush=True)


if __name__ == "__main__":
    main()
