"""One engine, one setting: decode steps over a cache that vLLM's own connector has filled.

Reads a job as JSON from standard input, prints seconds per step as JSON.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    context, batch, steps = job["context"], job["batch"], job["steps"]
    llm = LLM(
        job["model"],
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=context + steps + 16,
        max_num_seqs=batch,
        max_num_batched_tokens=max(2048, context + 16),
        enable_prefix_caching=False,
        additional_config={} if job["kvcomp"] is None else {"kvcomp": job["kvcomp"]},
        kv_transfer_config={
            "kv_connector": "DecodeBenchConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"fill_std": 0.5, "startup_fill": True},
        },
    )
    prompts = [
        {"prompt_token_ids": [3 + (row * 7919 + i * 31) % 1000 for i in range(context)]}
        for row in range(batch)
    ]

    def seconds(tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    seconds(4)
    found = []
    for _ in range(job["repeats"]):
        short = seconds(1)
        found.append((seconds(1 + steps) - short) / steps)
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
