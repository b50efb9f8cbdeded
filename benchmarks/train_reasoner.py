"""Train the bundled reasoner, the tiny model of ``kvcomp.reasoner``, from nothing.

    python benchmarks/train_reasoner.py --out DIR             # under an hour on two CPU cores
    python benchmarks/train_reasoner.py --out DIR --resume    # go on from DIR/checkpoint.pt
    python benchmarks/train_reasoner.py --evaluate DIR        # free-running greedy decoding
    python benchmarks/train_reasoner.py --smoke               # a few seconds, for CI

The hard part of the task is to look a fact up in the prompt for the first time; running sums and
the re-use of steps already written come by themselves. What makes it trainable in minutes:

* The first layer starts with three positional heads, looking 1, 2 and 3 tokens back, set up by
  their q and k biases, and two later layers start with heads that compare what those heads wrote.
  With this rough circuit to start from, targets in the first drill are at 0.78 after fifty steps;
  with the positional heads alone they were still at chance after 1,700.
* Recall drills come first: few facts, many short examples, random sources instead of a walk, loss
  on what must be looked up. Then more facts.
* Walks follow, with gaps in the position ids that stand for long outputs; then walks of full
  length.

Last, the two recall layers part: layer 2 points at facts and layer 5 reads them. Layer 5 learns to
work without layer 2, whose attention still finds each fact, but from then on writes nothing. In a
large model attention of neighbouring layers agrees, and methods that choose tokens in one layer for
the next build on it; in a model this small one layer did all of the recall, so that pages could be
chosen at random as long as that layer was dense.

All of it is in this one long file, from the data to the table, so that the weights have one recipe.
Qwen3 with biases rather than Qwen2, because transformers gives every Qwen2 directory Qwen2's own
byte-level tokenizer, whatever its files say.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvcomp.reasoner import task

HEAD_DIM, ROPE_THETA, EPS = 64, 1e6, 1e-6
MAX_POSITION = 4096
FAST_PAIRS = 10  # of 32: RoPE frequencies that tell a token from its neighbours
POINTER, READER = RECALL_LAYERS = 2, 5  # of 8: the first finds facts, the second reads them
# What a supervised token asks for; NONE carries no loss.
NONE, SOURCE, TARGET_FIRST, TARGET_AGAIN, WEIGHT_FIRST, WEIGHT_AGAIN, SUM = range(7)
KINDS = ("source", "target 1st", "target again", "weight 1st", "weight again", "sum")


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum. Ranges are drawn from anew for each batch, ends included."""

    name: str
    steps: int  # optimiser steps at most
    tokens: int  # tokens in a batch, about
    nodes: tuple[int, int]
    walk: tuple[int, int]  # steps in the answer
    jump: tuple[float, float]  # share of steps, drawn per example, that jump to a random fact
    gap: int = 0  # longest gap in position ids
    lr: tuple[float, float] = (2e-3, 2e-3)  # at the start and at the end of the stage
    skip: float = 0.0  # share of batches in which one layer's attention writes nothing
    skippable: tuple[int, ...] = RECALL_LAYERS  # which layer: one of these, at random
    until: float = 2.0  # first-visit accuracy in training that ends the stage early


DRILL = (1.0, 1.0)
CURRICULUM = [
    Stage("drill, 4 nodes", 1000, 6400, (2, 4), (4, 8), DRILL, until=0.97),
    Stage("drill, 16 nodes", 600, 4000, (4, 16), (8, 32), DRILL, until=0.99),
    Stage("drill, 64 nodes", 600, 4000, (16, 64), (32, 64), DRILL, 512, until=0.99),
    Stage("walks", 400, 4000, (4, 56), (32, 96), (0.0, 1.0), 1024, (2e-3, 1e-3)),
    Stage("long walks", 300, 4000, (8, 64), (64, 192), (0.0, 0.5), 2048, (1e-3, 4e-4)),
    Stage("full length", 50, 4800, (12, 56), (480, 540), (0.0, 0.2), 64, (4e-4, 0.0)),
    Stage("two recall layers", 250, 4000, (8, 56), (48, 160), (0.0, 0.6), 2048, (1e-3, 0.0), 0.8),
    Stage("reader", 150, 4000, (8, 56), (48, 200), (0.0, 0.3), 2048, (6e-4, 0.0), 1.0, (POINTER,)),
]
SMOKE = [
    Stage("drill", 3, 512, (2, 4), (4, 8), DRILL),
    Stage("walks", 3, 512, (4, 8), (8, 16), (0.0, 1.0), 64, (1e-3, 0.0), 1.0, (POINTER,)),
]


# --- data ---------------------------------------------------------------------------------------


def make_batch(rng: np.random.Generator, stage: Stage) -> tuple[np.ndarray, ...]:
    """Draw problems of equal size: ``ids``, ``positions`` and ``kinds``, each ``[B, T]`` int64.

    A jump goes to a random fact instead of the one that the walk asks for. Its source cannot be
    foreseen and carries no loss; it makes first visits plentiful and teaches to go on from
    anywhere. A gap in the positions at a jump makes the sum before it unreachable for the heads
    that count positions, so that sum carries no loss either.
    """
    nodes = int(rng.integers(stage.nodes[0], stage.nodes[1] + 1))
    walk = int(rng.integers(stage.walk[0], stage.walk[1] + 1))
    facts, prompt = 2 * nodes, 1 + 3 * 2 * nodes + 4  # bos, facts, "from x sum 0"
    batch = max(1, stage.tokens // (prompt + task.TOKENS_PER_STEP * walk))
    rows = np.arange(batch)
    first = {
        kind: task.TOKEN_ID[word]
        for kind, word in {"digit": "0", "target": task.NAMES[0], "source": task.SOURCES[0]}.items()
    }

    target, weight, live = task.random_graphs(rng, batch, nodes)
    target, weight = target.reshape(batch, facts), weight.reshape(batch, facts)
    name = _shuffles(rng, batch, len(task.NAMES))  # node -> name
    if stage.jump == DRILL:  # targets need not be nodes: fewer lucky guesses
        goal = rng.integers(0, len(task.NAMES), (batch, facts))
    else:
        goal = np.take_along_axis(name, target, 1)
    source = 2 * np.repeat(name[:, :nodes], 2, axis=1) + np.tile([0, 1], nodes)
    fact = np.stack([first["source"] + source, first["target"] + goal, first["digit"] + weight], 2)
    listed = np.take_along_axis(fact, _shuffles(rng, batch, facts)[:, :, None], 1)

    node, total = rng.integers(0, live, batch), rng.integers(0, 10, batch)
    start = np.empty((batch, 4), dtype=np.int64)
    start[:, 0], start[:, 2] = task.TOKEN_ID["from"], task.TOKEN_ID["sum"]
    start[:, 1], start[:, 3] = first["target"] + name[rows, node], first["digit"] + total

    jump = rng.random((batch, walk)) < rng.uniform(*stage.jump, batch)[:, None]
    far = jump & (rng.random((batch, walk)) < 2 / walk)
    gap = np.where(far, rng.integers(0, stage.gap + 1, (batch, walk)) // 2, 0)
    deck = _shuffles(rng, batch, facts)
    seen = np.zeros((batch, facts), dtype=bool)
    steps = np.empty((batch, walk, task.TOKENS_PER_STEP), dtype=np.int64)
    kinds = np.empty_like(steps)
    for t in range(walk):
        at = np.where(jump[:, t], deck[:, t % facts], 2 * node + task.is_high(total))
        again = seen[rows, at]
        seen[rows, at] = True
        node, total = target[rows, at], (total + weight[rows, at]) % 10
        steps[:, t, :3], steps[:, t, 3] = fact[rows, at], first["digit"] + total
        kinds[:, t, 0] = np.where(jump[:, t], NONE, SOURCE)
        kinds[:, t, 1] = TARGET_FIRST + again
        kinds[:, t, 2] = WEIGHT_FIRST + again
        kinds[:, t, 3] = np.where(gap[:, t] > 0, NONE, SUM)

    bos = np.full((batch, 1), task.TOKEN_ID["<bos>"])
    flat = [bos, listed.reshape(batch, -1), start, steps.reshape(batch, -1)]
    ids = np.concatenate(flat, 1)
    stride = np.ones_like(ids)
    stride[:, prompt - 4] += rng.integers(0, stage.gap + 1, batch)
    stride[:, prompt :: task.TOKENS_PER_STEP] += gap
    all_kinds = np.full_like(ids, NONE)
    all_kinds[:, prompt:] = kinds.reshape(batch, -1)
    return ids, stride.cumsum(1) - 1, all_kinds


def _shuffles(rng: np.random.Generator, batch: int, n: int) -> np.ndarray:
    """``batch`` random permutations of ``range(n)``: ``[batch, n]``."""
    return rng.random((batch, n)).argsort(axis=1)


# --- model --------------------------------------------------------------------------------------


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


# --- training -----------------------------------------------------------------------------------


def train_step(
    model: Qwen3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: list[torch.Tensor],
    skipped: int | None,
) -> torch.Tensor:
    """One optimiser step; returns the accuracy per kind ``[7]``, nan where a kind did not occur."""
    ids, positions, kinds = batch
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = hidden_states(model, ids[:, :-1], positions[:, :-1], skipped)
        asked = kinds[:, 1:] != NONE
        logits = model.lm_head(hidden[asked])
    gold, kind = ids[:, 1:][asked], kinds[:, 1:][asked]
    loss = F.cross_entropy(logits.float(), gold)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    right = (logits.argmax(-1) == gold).float()
    hits = torch.zeros(7, device=ids.device).index_add_(0, kind, right)
    return (hits / torch.bincount(kind, minlength=7)).cpu()


def train(args: argparse.Namespace, curriculum: list[Stage], out: Path, console: Console) -> None:
    """Run the curriculum, writing ``checkpoint.pt`` every 100 steps and the weights per stage."""
    device = torch.device(args.device)
    checkpoint = out / "checkpoint.pt"
    state = {"stage": 0, "index": 0, "step": 0, "seconds": 0.0}
    if args.resume:
        saved = torch.load(checkpoint, map_location=device)
        state = saved["state"]
    model = new_model(args.seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    if args.resume:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    accuracy = state.get("accuracy")

    def save() -> None:
        state["accuracy"] = accuracy
        parts = {"state": state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(parts, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        while state["stage"] < len(curriculum):
            stage = curriculum[state["stage"]]
            bar = progress.add_task(stage.name, total=stage.steps, completed=state["index"])
            while state["index"] < stage.steps:
                clock = time.perf_counter()
                rng = np.random.default_rng([task.TRAINING, args.seed, state["step"]])
                batch = [torch.from_numpy(x).to(device) for x in make_batch(rng, stage)]
                skipped = rng.choice(stage.skippable) if rng.random() < stage.skip else None
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(stage, state)
                now = train_step(model, optimizer, batch, skipped)
                accuracy = now if accuracy is None else smooth(accuracy, now)
                state["index"] += 1
                state["step"] += 1
                state["seconds"] += time.perf_counter() - clock
                progress.update(bar, completed=state["index"])
                if state["step"] % 25 == 0:
                    console.print(report(stage, state, accuracy))
                if state["step"] % 100 == 0:
                    save()
                recall = min(accuracy[TARGET_FIRST], accuracy[WEIGHT_FIRST])
                if state["index"] > 60 and recall > stage.until:
                    break
            progress.update(bar, total=state["index"])
            progress.stop_task(bar)
            state["stage"], state["index"], accuracy = state["stage"] + 1, 0, None
            save()
            export(model, out, stage.skippable[0] if stage.skip == 1.0 else None)


def learning_rate(stage: Stage, state: dict) -> float:
    """Linear within a stage; the first hundred steps of all warm up."""
    start, end = stage.lr
    warm_up = min(1.0, (state["step"] + 1) / 100)
    return warm_up * (start + (end - start) * state["index"] / stage.steps)


def smooth(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Running mean over about twenty steps; kinds absent from a batch keep their value."""
    new = torch.where(new.isnan(), old, new)
    return torch.where(old.isnan(), new, 0.95 * old + 0.05 * new)


def report(stage: Stage, state: dict, accuracy: torch.Tensor) -> str:
    shares = "  ".join(
        f"{kind} {share:.3f}" for kind, share in zip(KINDS, accuracy[1:].tolist(), strict=True)
    )
    return f"{state['seconds']:6.0f} s  step {state['step']:5d}  {stage.name}: {shares}"


# --- files --------------------------------------------------------------------------------------


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
    copy.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=2048,
        bos_token_id=task.TOKEN_ID["<bos>"],
        eos_token_id=task.TOKEN_ID["<eos>"],
        pad_token_id=task.TOKEN_ID["<pad>"],
    )
    copy.to(torch.bfloat16).save_pretrained(out)
    build_tokenizer().save_pretrained(out)


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


# --- evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def answers(model, tokenizer, problems: list[task.Problem]) -> list[str]:
    """Greedy free-running answers, all problems in one batch; prompts of equal length."""
    prompts = tokenizer([p.prompt for p in problems], return_tensors="pt").to(model.device)
    new = problems[0].steps * problems[0].tokens_per_step
    ids = model.generate(**prompts, do_sample=False, max_new_tokens=new)
    start = prompts["input_ids"].shape[1]
    return tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)


def evaluate(args: argparse.Namespace, directory: str, console: Console) -> None:
    """Print step, first-visit and final-answer accuracy on held-out problems."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(args.device).eval()
    columns = "nodes", "steps", "problems", "step", "first visit", "final answer", "seconds"
    table = Table(*columns, title=f"{directory}  {args.dtype}")
    for nodes in args.nodes:
        clock = time.perf_counter()
        problems = [task.make_problem(nodes, args.steps, seed) for seed in range(args.problems)]
        texts = answers(model, tokenizer, problems)
        grades = [task.grade(p, text) for p, text in zip(problems, texts, strict=True)]
        shares = (
            np.mean([g.step_accuracy for g in grades]),
            np.mean([g.first_visit_accuracy for g in grades]),
            np.mean([g.final_correct for g in grades]),
        )
        row = [str(nodes), str(args.steps), str(len(problems)), *(f"{x:.2%}" for x in shares)]
        table.add_row(*row, f"{time.perf_counter() - clock:.0f}")
    console.print(table)


# --- command line -------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory of checkpoint and weights")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps, for CI")
    parser.add_argument("--evaluate", metavar="DIR", help="evaluate a model and exit")
    parser.add_argument("--nodes", type=int, nargs="+", default=[16, 48], help="for --evaluate")
    parser.add_argument("--steps", type=int, default=512, help="for --evaluate: steps per problem")
    parser.add_argument("--problems", type=int, default=16, help="for --evaluate")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    args = parser.parse_args(argv)
    if not (args.out or args.smoke or args.evaluate):
        parser.error("give --out DIR, --smoke or --evaluate DIR")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    console = Console()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.evaluate:
        evaluate(args, args.evaluate, console)
        return
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        train(args, SMOKE if args.smoke else CURRICULUM, out, console)
        args.nodes, args.steps, args.problems = ([4], 8, 2) if args.smoke else ([16, 48], 512, 16)
        evaluate(args, str(out), console)


if __name__ == "__main__":
    main()
