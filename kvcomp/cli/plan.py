"""kvcomp plan."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated

import torch
import typer

from kvcomp import METHODS, Method
from kvcomp import plan as work
from kvcomp.cli.common import output_console, pick_device, pick_dtype, pick_method, pretrained
from kvcomp.cli.generate import build_method
from kvcomp.cli.plan_table import headline, notes, table


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a config.json, a GGUF file, a hub name, or a short name ('reasoner')."
        ),
    ],
    context: Annotated[int, typer.Option(help="Tokens of a sequence.", min=1)] = 32768,
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 1,
    device: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(work.DEVICES)}; or cpu, cuda: this machine, measured. Default: the"
            " GPU here, or the CPU.",
            metavar="NAME",
        ),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s that memory delivers, instead.")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="GB for weights, K and V, instead.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="By name; repeat for several, or 'all'. Default: those that are no baselines.",
            metavar="NAME",
        ),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Tokens per layer, of every method that has one.")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Of delethink: tokens that the first chunk generates.")
    ] = None,
    carry: Annotated[
        int | None, typer.Option(help="Of delethink: tokens carried on; default: half a chunk.")
    ] = None,
    inner: Annotated[
        str | None, typer.Option(help="Of delethink: the method within a chunk.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Another field, as of `generate`; METHOD.FIELD=VALUE where several have it.",
            metavar="FIELD=VALUE",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(help="Tokens of the context that are the prompt.", min=0)
    ] = 0,
    generate: Annotated[
        int | None,
        typer.Option(help="Also average over a generation of so many tokens.", min=1),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16; default: the config's, else bfloat16.",
            metavar="NAME",
        ),
    ] = None,
    weights: Annotated[
        float | None, typer.Option(help="GB of all weights, where they are quantized.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """What a step must read, what fits, and what a method can give.

    No weights are needed. A floor for time is the bytes of a step over the bandwidth, a ceiling for
    a method the floor of dense attention over its own.
    """
    kind = pick_dtype(dtype)
    chunks = {"chunk": chunk, "carry": chunk // 2 if chunk and carry is None else carry}
    name = model_name(model)
    methods = build_methods(method or [], name, budget, settings or [], chunks, inner)
    for option, value in (("bandwidth", bandwidth), ("memory", memory), ("weights", weights)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"kvcomp: --{option}: expected a number above 0, got {value:g}")

    from transformers import AutoConfig

    from kvcomp.hf.shape import shape_of

    config = pretrained(AutoConfig, "config", model)
    size = None if weights is None else weights * 1e9
    found = work.plan(
        shape_of(config, name=name, dtype=kind, weights=size),
        find_device(device, bandwidth, memory),
        methods,
        context=context,
        batch=batch,
        prompt=prompt_tokens,
        generate=generate,
    )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    console = output_console()
    for line in headline(found):
        console.print(line, highlight=False, soft_wrap=True)
    console.print()
    console.print(table(found))
    console.print()
    for line in notes(found, methods):
        console.print(line, highlight=False, soft_wrap=True)


def build_methods(
    names: list[str],
    model: str,
    budget: int | None,
    settings: list[str],
    chunks: dict[str, int | None],
    inner: str | None,
) -> list[Method]:
    """The methods asked for; each gets those of the options that are about it."""
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
        elif takers or len(names) == 1:  # of one method, what is wrong with it is said there
            for name in takers or names:
                own[name].append(setting)
        else:
            raise ValueError(f"kvcomp: --set: no field {key!r} in any of {', '.join(names)}")
    given = {"budget": budget, "inner": inner, **chunks}
    for option, value in given.items():
        where = "inner" if option == "budget" and inner is not None else option
        if value is not None and not any({option, where} & fields[name] for name in names):
            raise ValueError(f"kvcomp: --{option}: none of {', '.join(names)} has one")
    built = []
    for name in names:
        mine = {key: value for key, value in given.items() if key in fields[name]}
        nested = mine.get("inner") is not None
        built.append(
            build_method(
                name,
                model,
                budget if nested else mine.get("budget"),
                own[name],
                {key: mine.get(key) for key in chunks},
                mine.get("inner"),
            )
        )
    return built


def find_device(name: str | None, bandwidth: float | None, memory: float | None) -> work.Device:
    """By name, or this machine as measured; --bandwidth and --memory, in GB, instead of either."""
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
    """Its bandwidth, measured now, and the memory that is free."""
    from kvcomp.probe import bandwidth_probe

    if name == "cpu":
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free, probe = int(facts["MemAvailable"].split()[0]) * 1024, bandwidth_probe()
    else:
        with torch.cuda.device(name):
            free, probe = torch.cuda.mem_get_info()[0], bandwidth_probe("cuda")
    return work.Device(name, probe.gbps * 1e9, free, source=f"measured: {probe.name}")


def model_name(model: str) -> str:
    """Without the folders that it is in, if it is one or a config in one."""
    path = Path(model)
    if not path.exists():
        return model
    path = path.resolve()
    return path.parent.name if path.name == "config.json" else path.name
