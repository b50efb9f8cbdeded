"""What `from_pretrained` needs of the trained reasoner: config, weights, tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM

from kvcomp.reasoner import task
from training.circuit import MAX_POSITION


@torch.no_grad()
def export(model: Qwen3ForCausalLM, out: Path, skipped: int | None) -> None:
    """Write what ``from_pretrained`` needs: config, bf16 weights, generation config, tokenizer.

    The attention of layer ``skipped`` still looks, but writes nothing.
    """
    copy = Qwen3ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    if skipped is not None:
        copy.model.layers[skipped].self_attn.o_proj.weight.zero_()
        copy.model.layers[skipped].self_attn.o_proj.bias.zero_()
    fold_output_bias(copy)
    copy.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=2048,
        bos_token_id=task.TOKEN_ID["<bos>"],
        eos_token_id=task.TOKEN_ID["<eos>"],
        pad_token_id=task.TOKEN_ID["<pad>"],
    )
    copy.to(torch.bfloat16).save_pretrained(out)
    build_tokenizer().save_pretrained(out)


@torch.no_grad()
def fold_output_bias(model: Qwen3ForCausalLM) -> None:
    """Move the bias of each output projection into that of its value projection, in place.

    The weights of attention sum to 1, so a constant in the values is a constant in the output.
    Serving engines drop the bias of Qwen3's output projection and keep the others. Directions in
    which the projection hardly writes are left out, as they would need large values.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        weight = attention.o_proj.weight.double()
        groups = attention.num_key_value_groups
        by_kv_head = weight.view(len(weight), -1, groups, attention.head_dim).sum(2).flatten(1)
        shift = torch.linalg.pinv(by_kv_head, rtol=0.01) @ attention.o_proj.bias.double()
        attention.v_proj.bias += shift.to(attention.v_proj.bias.dtype)
        attention.o_proj.bias.zero_()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; ``<bos>`` is put in front."""
    words = Tokenizer(models.WordLevel(dict(task.TOKEN_ID), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = ("<bos>", task.TOKEN_ID["<bos>"])
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=MAX_POSITION,
        clean_up_tokenization_spaces=False,
    )
