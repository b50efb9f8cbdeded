"""Ops: every tensor of every op with another dtype, on another device, and with a row too few, and
every argument of another type."""

import inspect

import numpy as np
import torch

from bad_input import Bad, op_calls
from bad_input.op_calls import Call
from kvcomp import ops

ROWLESS = {"inv_freq", "x"}  # the same for all rows, or of any number
TENSOR, WHOLE, NUMBER = "a tensor", "a whole number of 64 bits", "a number"
MISTAKES = {  # by annotation -> what is expected, and what people pass
    "Tensor": (TENSOR, (None, "q", 3, [1.0, 2.0], np.zeros(2))),
    "Tensor | None": (f"{TENSOR} or None", ("q", 3, [1.0, 2.0], np.zeros(2))),
    "list[Tensor]": ("a list of tensors", (None, "pool", (torch.zeros(2),), torch.zeros(2))),
    "int": (WHOLE, (None, "16", 2.5, [16], 2**70)),
    "float": (NUMBER, (None, "0.5", [0.5], np.zeros(2))),
    "float | None": (NUMBER, ("0.5", [0.5], np.zeros(2))),
    "int | None": (WHOLE, ("1", 2.5, np.zeros(2))),
    "int | Tensor | None": (WHOLE, ("1", 2.5, np.zeros(2))),
    "bool": ("True or False", (None, 1, "yes", np.zeros(2))),
    "str": ("one of", ()),  # of words, which other rows are about
}


def changed(op, name, change):
    """The good call of an op with one argument changed."""

    def make():
        arguments = arguments_of(op)
        arguments[name] = change(arguments.get(name))
        return Call(getattr(ops, op), **arguments)

    return make


def arguments_of(op):
    call = getattr(op_calls, op)()
    return dict(inspect.signature(getattr(ops, op)).bind(*call.args, **call.named).arguments)


def rows_of(op):
    tensors = [name for name, value in arguments_of(op).items() if isinstance(value, torch.Tensor)]
    for name in tensors:
        named = rf"^kvcomp\.{op}: argument '{name}'"
        for dtype in (torch.bool, torch.complex64):
            yield Bad(changed(op, name, lambda x, t=dtype: x.to(t)), named, TypeError)
        if name != tensors[0]:  # on that depends who is asked: the meta device has its own answer
            there = rf"{named}: expected .*got torch.strided on meta"
            yield Bad(changed(op, name, lambda x: x.to("meta")), there)
        if name not in ROWLESS:  # one of them is short of rows, or has one too many
            yield Bad(changed(op, name, lambda x: x[:1]), rf"^kvcomp\.{op}: argument '\w+'")


def mistyped_rows_of(op):
    for name, parameter in inspect.signature(getattr(ops, op)).parameters.items():
        expected, wrong = MISTAKES[parameter.annotation]
        for value in wrong:
            said = repr(value) if value is None or isinstance(value, (str, float, int)) else ""
            match = rf"^kvcomp\.{op}: argument '{name}': expected {expected}, got {said}"
            yield Bad(changed(op, name, lambda _, new=value: new), match, TypeError)


ROWS = [row for op in ops.OPS for row in (*rows_of(op), *mistyped_rows_of(op))]
