"""kvcomp plan."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from kvcomp import METHODS, Method
from kvcomp import plan as work
from kvcomp.checks import require
from kvcomp.cli.common import Kv, pick_device, pick_dtype, pick_kv, pretrained
from kvcomp.cli.output import say, say_aside, show
from kvcomp.cli.plan_table import headline, notes, table
from kvcomp.cli.settings import (
    Carry,
    Chunk,
    Inner,
    build_method,
    chunk_options,
    pick_method,
)


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder, config.json, GGUF file, hub name, or short name ('reasoner')."
        ),
    ],
    context: Annotated[int, typer.Option(help="Context length in tokens.", min=1)] = 32768,
    batch: Annotated[int, typer.Option(help="Sequences decoded at once.", min=1)] = 1,
    device: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(work.DEVICES)}, or cpu or cuda to measure this machine. Default: the"
            " GPU of this machine, or its CPU.",
            metavar="NAME",
        ),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Memory bandwidth in GB/s, instead of the device's.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="Memory in GB for weights, K and V, instead of the device's."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method name; repeat for several, or 'all'. Default: all but the baselines.",
            metavar="NAME",
        ),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Tokens per layer, for every method that has a budget.")
    ] = None,
    chunk: Chunk = None,
    carry: Carry = None,
    inner: Inner = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Set any other field of the methods that have it; METHOD.FIELD=VALUE for one.",
            metavar="FIELD=VALUE",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(help="Prompt tokens, which are part of the context.", min=0)
    ] = 0,
    generate: Annotated[
        int | None,
        typer.Option(help="Also show the mean over a generation of this many tokens.", min=1),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16; default: the config's, else bfloat16.",
            metavar="NAME",
        ),
    ] = None,
    kv: Kv = "model",
    weights: Annotated[
        float | None, typer.Option(help="Size of all weights in GB, if they are quantized.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Bound decode time, memory and speed-up from the config.

    The lower bound for the time of a step is the bytes it must read over the memory bandwidth. The
    upper bound for the speed-up of a method is the bound of dense attention over its own.
    """
    kind, kept = pick_dtype(dtype), pick_kv(kv)
    chunks = chunk_options(chunk, carry)
    name = model_name(model)
    methods = build_methods(method or [], name, budget, settings or [], chunks, inner)
    for option, value in (("bandwidth", bandwidth), ("memory", memory), ("weights", weights)):
        if value is not None:
            require(0 < value < math.inf, f"kvcomp: --{option}", "a number above 0", value)

    from transformers import AutoConfig

    from kvcomp.hf.shape import shape_of

    config = pretrained(AutoConfig, "config", model)
    size = None if weights is None else weights * 1e9
    shape = shape_of(config, name=name, dtype=kind, weights=size)
    if method in (None, [], ["all"]) and not settings:  # what was set and does not fit is an error
        methods = fitting(methods, shape.layers)
    found = work.plan(
        shape,
        find_device(device, bandwidth, memory),
        methods,
        context=context,
        batch=batch,
        prompt=prompt_tokens,
        generate=generate,
        kv=kept,
    )
    if as_json:
        say(json.dumps(found.to_dict(), indent=2))
    else:
        show(*headline(found), "", table(found), "", *notes(found, methods))


def build_methods(
    names: list[str],
    model: str,
    budget: int | None,
    settings: list[str],
    chunks: dict[str, int | None],
    inner: str | None,
) -> list[Method]:
    """The methods `names`; each gets the options that it has a field for."""
    if names == ["all"]:
        names = sorted(METHODS, key=lambda name: METHODS[name].baseline)
    names = list(dict.fromkeys(names)) or [n for n in METHODS if not METHODS[n].baseline]
    fields = {n: {field.name for field in dataclasses.fields(pick_method(n))} for n in names}
    own: dict[str, list[str]] = {name: [] for name in names}
    for setting in sorted(settings, key=lambda text: text.partition(".")[0] in own):
        target, _, rest = setting.partition(".")
        key = setting.partition("=")[0].partition(".")[0]
        takers = [name for name in names if key in fields[name]]
        if target in own:  # behind those for all, and so it wins over them
            own[target].append(rest)
        elif takers or len(names) == 1:  # build_method names the fields of a single method
            for name in takers or names:
                own[name].append(setting)
        else:
            raise ValueError(f"kvcomp: --set: no field {key!r} in any of {', '.join(names)}")
    sizes = {"budget": budget, **chunks}
    for option, value in {**sizes, "inner": inner}.items():
        where = "inner" if option == "budget" and inner is not None else option
        if value is not None and not any({option, where} & fields[name] for name in names):
            raise ValueError(f"kvcomp: --{option}: none of {', '.join(names)} has one")
    built = []
    for name in names:
        mine = {key: value for key, value in sizes.items() if key in fields[name]}
        own_inner = inner if "inner" in fields[name] else None
        built.append(
            build_method(
                name,
                model,
                mine.get("budget") if own_inner is None else budget,
                own[name],
                {key: mine.get(key) for key in chunks},
                own_inner,
            )
        )
    return built


def fitting(methods: list[Method], num_layers: int) -> list[Method]:
    """The methods that fit a model of `num_layers` layers; standard error says what others lack."""

    def fits(method: Method) -> bool:
        try:
            method.check(num_layers)
        except ValueError as error:
            say_aside(f"kvcomp: left out: {str(error).removeprefix('kvcomp.')}")
            return False
        return True

    return [method for method in methods if fits(method)]


def find_device(name: str | None, bandwidth: float | None, memory: float | None) -> work.Device:
    """The device `name`, or this machine as measured; bandwidth (GB/s) and memory (GB) override."""
    if name is None and bandwidth is not None and memory is not None:
        device = work.Device("given", 0, 0)
    elif name in work.DEVICES:
        device = work.DEVICES[name]
    elif name is None or name.partition(":")[0] in ("cpu", "cuda"):
        device = this_machine(pick_device(name))
    else:
        known = ", ".join([*work.DEVICES, "cpu", "cuda"])
        raise ValueError(f"kvcomp: --device: expected one of {known}, got {name!r}")
    if bandwidth is not None:
        device = dataclasses.replace(device, bandwidth=bandwidth * 1e9, source="given")
    if memory is not None:
        device = dataclasses.replace(device, memory=memory * 1e9)
    return device


def this_machine(name: str) -> work.Device:
    """This machine: its bandwidth, measured now, and its free memory."""
    from kvcomp.probe import bandwidth_probe

    if name == "cpu":
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free, probe = int(facts["MemAvailable"].split()[0]) * 1024, bandwidth_probe()
    else:
        with torch.cuda.device(name):
            free, probe = torch.cuda.mem_get_info()[0], bandwidth_probe("cuda")
    return work.Device(name, probe.gbps * 1e9, free, source=f"measured: {probe.name}")


def model_name(model: str) -> str:
    """The last part of a folder's path, or of the path to the folder of a config.json."""
    if not os.path.exists(model):
        return model
    path = Path(model).resolve()
    return path.parent.name if path.name == "config.json" else path.name
