#!/usr/bin/env bash
# torch 2.13.0 on a CPU: index_add_ and index_put_(accumulate=True) add up bfloat16 numbers in bfloat16,
# one by one, so a sum of ones stops at 256. scatter_add_ with the same indices, cumsum, sum, embedding_bag
# and a matrix product add up in float32 and round once. In float16 the sum stops at 2048. So scores of
# tokens that are counted with index_add_ saturate without a warning, and those with scatter_add_ do not.
#
# Seen: 256 for index_add_ and index_put_, 4992 (5000 in bfloat16) for the others.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import embedding_bag

print("torch", torch.__version__)
COUNT = 5000
where = torch.zeros(COUNT, dtype=torch.long)
changed = []
for dtype, stop in ((torch.bfloat16, 256), (torch.float16, 2048)):
    ones, whole = torch.ones(COUNT, dtype=dtype), torch.tensor(COUNT, dtype=dtype).item()
    empty = torch.zeros(1, dtype=dtype)
    sums = {
        "index_add_": (empty.clone().index_add_(0, where, ones), stop),
        "index_put_": (empty.clone().index_put_((where,), ones, accumulate=True), stop),
        "scatter_add_": (empty.clone().scatter_add_(0, where, ones), whole),
        "cumsum": (ones.cumsum(0)[-1], whole),
        "sum": (ones.sum(), whole),
        "matmul": (ones @ ones, whole),
        "embedding_bag": (embedding_bag(torch.arange(COUNT)[None], ones[:, None], mode="sum"), whole),
    }
    for name, (found, expected) in sums.items():
        print(f"{dtype} {name:13} {found.item():6.0f} of {whole:.0f}")
        if found.item() != expected:
            changed.append(f"{dtype} {name}")
raise SystemExit(f"changed: {changed}" if changed else 0)
PYTHON
