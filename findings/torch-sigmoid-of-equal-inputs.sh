#!/usr/bin/env bash
# torch.sigmoid and silu of one tensor of equal numbers give unequal numbers.
#
# torch 2.13.0 on a CPU with AVX2 or AVX-512: the last elements of a tensor, which do not fill a
# vector, come out one unit in the last place apart from the others. torch.exp, tanh and softmax do
# not do that. So scores that should tie do not, and which of them is the largest depends on the
# length of the tensor and on the machine.
#
# Exits with 1 where that is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
echo "torch==2.13.0" > "$work/constraints.txt"  # any build of it: the one for CPUs is the smallest
"$work/venv/bin/pip" install --quiet -c "$work/constraints.txt" torch
OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import torch

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
functions = {
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "softmax": lambda x: torch.softmax(x, 0),
}
unequal = {}
for name, function in functions.items():
    lengths = set()
    for value in torch.linspace(-3, 3, 121).tolist():
        for length in range(1, 201):
            result = function(torch.full((length,), value))
            if not torch.equal(result, result[:1].expand_as(result)):
                if not lengths:
                    print(f"{name} of {length} times {value:.4f}:", result.unique().tolist())
                lengths.add(length)
    unequal[name] = len(lengths)
    print(f"{name}: unequal at {len(lengths)} of 200 lengths")
if not (unequal["sigmoid"] and unequal["silu"]) or unequal["exp"] or unequal["softmax"]:
    sys.exit("torch behaves otherwise now")
PYTHON
