"""Decoding on caches of one size, beside the same on a cache that grows: what their tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig, PreTrainedModel

import kvcomp
from kvcomp import Method
from kvcomp.hf import Cache, Report, Run

STEPS = 40
UNCOUNTED = {"decode_seconds", "tokens_per_second"}
UNCOUNTED |= {
    "kv_bytes_allocated",
    "logits_bytes_allocated",
}  # a static cache is as large as can be


def padded_batch(rows: int = 2, width: int = 21, pad: int = 6) -> dict[str, Tensor]:
    """Token ids [rows, width] and their mask; where there are several, the first is padded."""
    ids = torch.randint(3, 128, (rows, width), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[0, :pad] = mask[0, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def compile_config(backend: str = "eager", **options: Any) -> CompileConfig:
    config = CompileConfig(backend=backend, fullgraph=True, mode=None, **options)
    config._compile_all_devices = True  # transformers compiles on accelerators only
    return config


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    cache: Cache,
    step: Callable,
    steps: int = STEPS,
) -> Tensor:
    """Greedy decoding in a loop of one's own: the logits of all steps, [steps, B, vocabulary]."""
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = [model(**batch, position_ids=positions, past_key_values=cache).logits[:, -1]]
    for count in range(steps - 1):
        token, given = logits[-1].argmax(-1, keepdim=True), {"past_key_values": cache}
        if len(token) > 1:  # a single row has the positions that the cache says
            given["position_ids"] = positions[:, -1:] + 1 + count
        logits.append(step(token, **given).logits[:, -1].clone())  # a graph's memory is used again
    return torch.stack(logits)


def reference(
    model: PreTrainedModel,
    method: Method,
    batch: dict[str, Tensor],
    steps: int = STEPS,
    **options: Any,
) -> tuple[Tensor, Report]:
    """The same under the dynamic flavour, with its report. `options` are for the patch."""
    with kvcomp.patch(model, method, **options) as run:
        logits = decode(model, batch, run.new_cache(), model, steps)
    return logits, run.report(layers=True)


def turns(model: PreTrainedModel, run: Run, batch: dict[str, Tensor]) -> Iterator[Tensor]:
    """Beams reorder rows, a second turn and pieces of a prompt attend to what is there, a copy goes
    on by itself, a prompt may be one token: what each gives.

    Args:
        batch: of two rows.
    """

    def generate(batch: dict[str, Tensor], **options: Any) -> Any:
        return model.generate(**batch, max_new_tokens=12, do_sample=False, **options)

    yield generate(batch, num_beams=3)
    yield generate(batch, prefill_chunk_size=5)
    one = torch.tensor([[7]])
    yield generate({"input_ids": one, "attention_mask": torch.ones_like(one)})
    first = generate(batch, return_dict_in_generate=True)
    yield generate(padded_batch(3))  # does not touch what is returned
    ids = torch.cat([first.sequences, batch["input_ids"][:, -9:]], 1)
    mask = torch.ones_like(ids)
    mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    second = {"input_ids": ids, "attention_mask": mask}
    for cache in (deepcopy(first.past_key_values), first.past_key_values):
        yield generate(second, past_key_values=cache)
    cache = run.new_cache()
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        mask = batch["attention_mask"]
        for new in ([[0], [1]], [[1], [1]]):  # the first row takes part in the second step only
            mask = torch.cat([mask, torch.tensor(new)], 1)
            given = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
            out = model(torch.full((2, 1), 9), past_key_values=cache, **given)
            yield out.logits[:, -1][mask[:, -1] > 0]
        cache.batch_repeat_interleave(2)
        for _ in range(8):
            yield model(torch.full((4, 1), 9), past_key_values=cache).logits


def same_figures(report: Report, expected: Report) -> None:
    got, wanted = report.to_dict(), expected.to_dict()
    for name in wanted.keys() - UNCOUNTED:
        assert got[name] == wanted[name], name


def addresses(cache: Cache) -> list[int]:
    """Of all that steps write in place, and the next ones read."""
    layers, ring = cache.kv.layers, cache.kv._ring
    kept = [x for layer in layers for x in (layer._k, layer._v, *layer._slab[2:])]
    kept += [note for layer in layers for note in layer._remembered.values()]
    kept += [] if ring is None else [ring.row]
    return [x.data_ptr() for x in (*kept, cache.kv.columns, cache.meter.counts)]


class OnMeta(TorchDispatchMode):
    """Every tensor of every op is on the meta device: none comes from the host or goes there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert not isinstance(x, Tensor) or x.is_meta, function
        return out


def to_meta(model: PreTrainedModel, cache: Cache) -> None:
    """Model and cache without their data, so that whoever reads a tensor fails."""
    device = torch.device("meta")
    model.to(device)
    for layer in cache.kv.layers:
        layer._bind(tuple(tensor.to(device) for tensor in layer._slab))
        for name, note in layer.state.items():
            layer.state[name] = note.to(device)
    if cache.kv._ring is not None:
        cache.kv._ring.row = cache.kv._ring.row.to(device)
    cache.text._ids = cache.text._ids.to(device)
    cache.kv.open(device)


def captured_step(
    model: PreTrainedModel, around: Callable[[Cache], AbstractContextManager] = nullcontext
) -> Callable:
    """A step for `decode` that warms up three times, and is one CUDA graph from then on.

    Args:
        around: of a cache, what each replay is in.
    """
    graph, side, given, result = torch.cuda.CUDAGraph(), torch.cuda.Stream(), {}, {}

    def step(token: Tensor, *, position_ids: Tensor, past_key_values: Cache) -> Any:
        if not given:
            given.update(token=token.clone(), positions=position_ids.clone(), warm_up=3)
        given["token"].copy_(token)
        given["positions"].copy_(position_ids)
        inputs = {"position_ids": given["positions"], "past_key_values": past_key_values}
        if given["warm_up"]:  # on a stream of its own, as capture wants it
            given["warm_up"] -= 1
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                out = model(given["token"], **inputs)
            torch.cuda.current_stream().wait_stream(side)
            return out
        if not result:
            with torch.cuda.graph(graph):
                result["out"] = model(given["token"], **inputs)
        with around(past_key_values):
            graph.replay()
        return result["out"]

    return step
