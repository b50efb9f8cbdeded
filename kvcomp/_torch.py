"""The private parts of PyTorch that kvcomp uses. They are all here, so that a release of PyTorch
that changes one of them breaks a single file."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

num_dispatch_modes = torch._C._len_torch_dispatch_stack  # () -> int: fake tensors, counters, ...
num_function_modes = torch._C._len_torch_function_stack  # () -> int: default devices, overrides
transforming = torch._C._are_functorch_transforms_active  # () -> bool: vmap, jvp, ...
tracing_state = torch._C._get_tracing_state  # () -> object or None: torch.jit.trace is at work


class OutsideInference:
    """A context outside of inference mode, without gradients: `inference_mode(False), no_grad()` in
    a fifth of the time."""

    def __enter__(self) -> None:
        self._guard = torch._C._InferenceMode(False)
        self._guard.__enter__()
        torch._C._set_grad_enabled(False)  # the end of the guard brings back what was before

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(*error)


def schema_arguments(schema: str) -> list[Any]:
    """The arguments of an operator schema, `name(Tensor a, ...) -> ...`, each with `name`, `type`,
    `kwarg_only` and more."""
    return torch._C.parse_schema(schema).arguments


def raw_stream(device: torch.device) -> int:
    """The current CUDA stream of a device as an integer, without building an object for it."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def freezing() -> AbstractContextManager[None]:
    """What inductor compiles within, without gradients, has the weights as its constants."""
    from torch._inductor import config

    return config.patch(freezing=True)


def keep_address(tensor: Tensor) -> None:
    """Tell compiled graphs that the tensor's memory stays where it is: CUDA graphs then read and
    write it in place instead of copying it."""
    torch._dynamo.mark_static_address(tensor, guard=False)
