"""bind(): one schema, one reference, and every implementation of an op.

The dispatcher gets the best implementation per device once, at import; the table OPS keeps all of
them, for tests, benchmarks and ``kvcomp info``. Nothing here looks anything up during a call.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from types import ModuleType

import torch

from kvcomp import _C, _torch
from kvcomp.ops._arguments import check_meta, check_types, explain, explain_size
from kvcomp.ops._widen import in_float32

LIBRARY = torch.library.Library("kvcomp", "DEF")
OPS: dict[str, Op] = {}
Native = Callable[[ModuleType, int], Callable]

# What the dispatcher prefers per device, best first.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
BACKENDS = {"cpu": _C.Backend.cpu, "cuda": _C.Backend.cuda}


@dataclass
class Op:
    """One op with its schema and implementations. Each takes the schema's arguments."""

    name: str
    schema: str
    reference: Callable
    fake: Callable
    native: Native | None
    impls: dict[str, Callable] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # implementation -> why it is absent
    bound: dict[str, str] = field(default_factory=dict)  # device type -> implementation

    def impl(self, name: str) -> Callable:
        """The implementation called `name`. Raises KeyError with the reason if there is none."""
        if name not in self.impls:
            why = self.missing.get(name, f"known: {', '.join(self.impls)}")
            raise KeyError(f"kvcomp.{self.name} has no implementation {name!r} here: {why}")
        return self.impls[name]


def bind(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    native: Native | None = None,
    backends: tuple[str, ...] | None = None,
    triton: bool = False,
) -> Callable:
    """Register the op and return the callable that goes straight to the dispatcher.

    Args:
        schema: argument list and returns, mutation included, without the name.
        reference: the specification, in plain PyTorch without dtype casts.
        fake: shapes and dtypes of the outputs.
        native: takes the extension and a backend number and returns a function of the schema's
            arguments. Without it the op runs its reference and checks only types and devices; the
            public function must then check shapes and values.
        backends: the backends that have sources, "cpu" and "cuda"; with `native`, "cpu".
        triton: whether ``kvcomp.ops.triton.<name>`` exists.
    """
    op = Op(name, f"{name}{schema}", reference, fake, native)
    check: Callable
    if native is None:
        backends, check = (), partial(check_types, name, op.schema)
    else:  # each boundary check is written once, in C++
        backends, check = backends or ("cpu",), native(_C, _C.Backend.check)
    op.impls["reference"] = _checked(check, _float32_fallback(reference, fake, schema))
    for backend in BACKENDS:
        if backend not in backends:
            op.missing[backend] = "not written"
        elif backend == "cuda" and (reason := _why_no_cuda()):
            op.missing[backend] = reason
        elif native is not None:  # without it there are no backends
            op.impls[backend] = native(_C, BACKENDS[backend])
    if not triton:
        op.missing["triton"] = "not written"
    elif importlib.util.find_spec("triton") is None:
        op.missing["triton"] = "triton is not installed"
    else:
        op.impls["triton"] = _checked(
            check, _lazy(lambda: importlib.import_module(f"kvcomp.ops.triton.{name}").launch)
        )

    LIBRARY.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device, preference in PREFERENCE.items():
        op.bound[device] = next(choice for choice in preference if choice in op.impls)
        LIBRARY.impl(name, op.impls[op.bound[device]], device.upper())
    torch.library.register_fake(f"kvcomp::{name}", _on_meta(op), lib=LIBRARY)
    OPS[name] = op
    return _shortcut(getattr(torch.ops.kvcomp, name).default, op)


def add_emulated(load: Callable[[], ModuleType]) -> None:
    """Add the implementation "cuda-host", CUDA code emulated on a CPU, to each op that has any.

    Only tests use it and build the module for it. It is never bound to the dispatcher.

    Args:
        load: imports the module, at the first call of such an implementation.
    """

    def emulated(native: Native) -> Callable:
        return _lazy(lambda: native(load(), _C.Backend.cuda))

    for op in OPS.values():
        if op.native is not None and op.missing.get("cuda") != "not written":
            op.impls["cuda-host"] = emulated(op.native)


@cache
def _why_no_cuda() -> str | None:
    build = _C.build_info()
    if not build["with_cuda"]:
        return "this build has no CUDA kernels"
    if not _C.cuda_driver_suffices():
        return f"it was built with CUDA {build['cuda_version']}, too new for the driver here"
    return None


def _shortcut(dispatched: Callable, op: Op) -> Callable:
    """A function that calls `dispatched`, or skips the dispatcher where it has nothing to do.

    It has nothing to do in a plain eager call: no compilation or tracing, no active mode (such as
    fake tensors) and no gradient. Skipping it saves about half the time of a small call. In return,
    torch.profiler does not see the call, because it listens to the dispatcher. Argument types are
    checked only after a call has failed, so correct calls do not pay for that.
    """
    on_cpu, on_cuda = op.impls[op.bound["cpu"]], op.impls[op.bound["cuda"]]
    # Found once: each look-up by dotted name would cost a call some 20 ns.
    is_compiling, num_modes = torch.compiler.is_compiling, _torch.num_dispatch_modes
    tracing_state, plain = _torch.tracing_state, torch.Tensor

    def call(*args):
        first = args[0]
        try:
            if (
                not is_compiling()
                and type(first) is plain
                and not first.requires_grad
                and not num_modes()
                and not tracing_state()
                and not first.is_neg()
            ):
                if first.is_cpu:
                    return on_cpu(*args)
                if first.is_cuda:
                    return on_cuda(*args)
            return dispatched(*args)
        except Exception as error:
            explain(op.name, op.schema, args)
            explain_size(op.name, op.schema, op.fake, args, error)
            raise

    return call


def raw_stream(tensor: torch.Tensor) -> int:
    """The current CUDA stream of the tensor's device as an integer; 0 if it is not on a GPU."""
    return _torch.raw_stream(tensor.device) if tensor.is_cuda else 0


def _on_meta(op: Op) -> Callable:
    """Shapes and dtypes of the outputs, for tensors that are all on meta, or none."""

    def shaped(*args):
        check_meta(op.name, op.schema, args)
        return op.fake(*args)

    return shaped


def _checked(check: Callable, run: Callable) -> Callable:
    def checked(*args):
        check(*args)
        return run(*args)

    return checked


def _lazy(load: Callable[[], Callable]) -> Callable:
    """A stand-in for the function that `load` returns. It loads it at the first call."""
    loaded = cache(load)
    return lambda *args: loaded()(*args)


def _float32_fallback(reference: Callable, fake: Callable, schema: str) -> Callable:
    """The reference computed in fp32 for 16-bit inputs, with the op's own output dtypes."""
    arguments = _torch.schema_arguments(f"op{schema}")
    changed = [i for i, arg in enumerate(arguments) if arg.alias_info and arg.alias_info.is_write]

    def run(*args):
        expected = fake(*args)
        wide = in_float32(args)
        result = reference(*wide)
        for i in changed:
            if i >= len(args):  # an optional one that was left out
                continue
            given, computed = (x if isinstance(x, list) else [x] for x in (args[i], wide[i]))
            for into, value in zip(given, computed, strict=True):
                if into is not value and into is not None:
                    into.copy_(_within_range(value, into.dtype))
        if isinstance(result, tuple):
            return tuple(r.to(e.dtype) for r, e in zip(result, expected, strict=True))
        return result.to(expected.dtype) if result is not None else None

    return run


def _within_range(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Finite values clamped to the range of `dtype`, so that rounding to it keeps them finite."""
    if dtype != torch.float16:
        return value
    limit = torch.finfo(dtype).max
    return torch.where(value.isinf(), value, value.clamp(-limit, limit))
