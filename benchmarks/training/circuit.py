"""The reasoner's architecture, and the rough circuit of recall that its training starts from.

Qwen3 with biases rather than Qwen2, because transformers gives every Qwen2 directory Qwen2's own
byte-level tokenizer, whatever its files say.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from kvcomp.reasoner import task

HEAD_DIM, ROPE_THETA, EPS = 64, 1e6, 1e-6
MAX_POSITION = 4096
FAST_PAIRS = 10  # of 32: RoPE frequencies that tell a token from its neighbours
POINTER, READER = RECALL_LAYERS = 2, 5  # of 8: the first finds facts, the second reads them


def new_model(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(task.VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        attention_bias=True,  # carries the positional heads
        max_position_embeddings=MAX_POSITION,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=EPS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=task.TOKEN_ID["<bos>"],
        eos_token_id=task.TOKEN_ID["<eos>"],
        pad_token_id=task.TOKEN_ID["<pad>"],
    )
    model = Qwen3ForCausalLM(config)
    initialise_recall(model)
    return model


@torch.no_grad()
def initialise_recall(model: Qwen3ForCausalLM) -> None:
    """Start with a rough recall circuit; training makes it exact.

    Heads 0, 1 and 2 of the first layer look 1, 2 and 3 tokens back. Two heads of two later layers
    compare what they wrote: head 0 the token itself with the token before each key (a source finds
    its target), head 2 the token before with the second token before (a target finds its weight,
    by their source). Both copy what they find.
    """
    model.model.embed_tokens.weight.normal_(0, 0.5)
    model.model.norm.weight.fill_(0.25)
    for layer in model.model.layers:  # quiet beside the circuit
        layer.self_attn.o_proj.weight *= 0.25
        layer.mlp.down_proj.weight *= 0.25
    first = model.model.layers[0].self_attn
    fast = torch.arange(HEAD_DIM) % (HEAD_DIM // 2) < FAST_PAIRS
    for norm in first.q_norm, first.k_norm:
        norm.weight[fast] = 3.0
    for head, back in enumerate((1, 2, 3)):
        look_back(first, head, back)
    seen = torch.nn.init.orthogonal_(first.v_proj.weight[:HEAD_DIM].clone())
    wrote = torch.nn.init.orthogonal_(torch.empty(128, 2 * HEAD_DIM))
    first.v_proj.weight[:HEAD_DIM] = seen
    first.o_proj.weight[:, : 2 * HEAD_DIM] = 0.5 * wrote
    once, twice = wrote.T.split(HEAD_DIM)
    for i in RECALL_LAYERS:
        match(model.model.layers[i].self_attn, 0, seen, once)
        match(model.model.layers[i].self_attn, 2, once, twice)


def match(attention: torch.nn.Module, head: int, query: torch.Tensor, key: torch.Tensor) -> None:
    """Let a head compare two readings ``[HEAD_DIM, hidden]`` of the residual, and copy the find.

    Only RoPE's slow half takes part, so that the match does not depend on distance.
    """
    slow = torch.arange(HEAD_DIM) % (HEAD_DIM // 2) >= HEAD_DIM // 4
    own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    shared = slice(head // 2 * HEAD_DIM, (head // 2 + 1) * HEAD_DIM)
    attention.q_proj.weight[own] = slow[:, None] * query
    attention.k_proj.weight[shared] = slow[:, None] * key
    attention.q_norm.weight.fill_(1.4)
    attention.k_norm.weight.fill_(1.4)
    copy = torch.nn.init.orthogonal_(torch.empty_like(query))
    attention.v_proj.weight[shared] = copy
    attention.o_proj.weight[:, own] = copy.T


def look_back(attention: torch.nn.Module, head: int, back: int) -> None:
    """Set q and k biases so that the head starts by attending ``back`` tokens before the query.

    A constant key and the same vector as query, rotated by ``back`` positions: their product after
    RoPE is ``sum cos((distance - back) * frequency)``. Only fast pairs tell neighbours apart.
    """
    pairs, size, half = FAST_PAIRS, 6.0, HEAD_DIM // 2
    angle = -back * frequencies()[:pairs]
    key = head // 2 * HEAD_DIM  # two query heads share a key head
    query = head * HEAD_DIM
    attention.k_proj.bias[key : key + pairs] = size
    attention.q_proj.bias[query : query + pairs] = size * angle.cos()
    attention.q_proj.bias[query + half : query + half + pairs] = size * angle.sin()


def frequencies() -> torch.Tensor:
    """RoPE's angles per position, ``[HEAD_DIM / 2]``, fastest first."""
    return ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def hidden_states(
    model: Qwen3ForCausalLM, ids: torch.Tensor, positions: torch.Tensor, skipped: int | None
) -> torch.Tensor:
    """Qwen3's forward pass over the model's own weights, without what training never uses.

    ids, positions ``[B, T]`` -> ``[B, T, hidden]``. The attention of layer ``skipped`` is left out.
    """
    batch, length = ids.shape
    angle = positions[:, None, :, None].float() * frequencies().to(ids.device)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch, length, -1, HEAD_DIM)

    def norm(x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], module.weight.to(x.dtype), EPS)

    h = model.model.embed_tokens(ids)
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        x = norm(h, layer.input_layernorm)
        q = rotate(norm(heads(attention.q_proj(x)), attention.q_norm).transpose(1, 2))
        k = rotate(norm(heads(attention.k_proj(x)), attention.k_norm).transpose(1, 2))
        v = heads(attention.v_proj(x)).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if i != skipped:
            h = h + attention.o_proj(x.transpose(1, 2).reshape(batch, length, -1))
        x = norm(h, layer.post_attention_layernorm)
        h = h + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return norm(h, model.model.norm)
