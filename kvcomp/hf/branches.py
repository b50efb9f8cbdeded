"""Model code that asks for the name of its attention implementation and makes another mask then.

`patch` gives the model the name "kvcomp". Code such as

    if self.config._attn_implementation in ("eager", "sdpa"):
        attention_mask = self.indexer.build_block_mask(...)

then makes no mask, and the layer attends to other tokens without an error. The source of the
model's modules shows it; a branch that leaves masks alone does no harm.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch.nn import Module

IMPLEMENTATION = "_attn_implementation"


def masks_by_name(model: Module) -> str | None:
    """The class and function of a module that branches in that way; None: there is none."""
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        for owner in kind.__mro__:
            if owner.__module__.startswith(("torch.", "transformers.modeling_utils")):
                continue
            if (found := _function(owner)) is not None:
                return f"{owner.__name__}.{found}"
    return None


@cache
def _function(kind: type) -> str | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # made without a file
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(map(_touches_mask, _branches(node))):
            return node.name
    return None


def _branches(function: ast.FunctionDef) -> Iterator[list[ast.AST]]:
    """What runs in each branch whose condition asks for the name, itself or through a variable."""
    asked = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and _asks(node.value, set())
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.If) and _asks(node.test, asked):
            yield [*node.body, *node.orelse]
        chosen = getattr(node, "value", None)  # assigned or returned: a if ... else b
        if isinstance(chosen, ast.IfExp) and _asks(chosen.test, asked):
            yield [node]


def _asks(condition: ast.AST, asked: set[str]) -> bool:
    """Whether a condition compares the name, or reads a variable that holds such a comparison."""
    for node in ast.walk(condition):
        if isinstance(node, ast.Compare):
            parts = [x for side in (node.left, *node.comparators) for x in ast.walk(side)]
            if any(getattr(x, "attr", getattr(x, "value", None)) == IMPLEMENTATION for x in parts):
                return True
        if isinstance(node, ast.Name) and node.id in asked:
            return True
    return False


def _touches_mask(branch: list[ast.AST]) -> bool:
    """Whether a mask is assigned or returned there."""
    for node in (x for statement in branch for x in ast.walk(statement)):
        if isinstance(node, ast.Assign):
            changed: list[ast.expr] = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            changed = [node.target]
        elif isinstance(node, ast.Return) and node.value is not None:
            changed = [node.value]
        else:
            continue
        names = (x for part in changed for x in ast.walk(part))
        if any("mask" in getattr(x, "id", getattr(x, "attr", "")) for x in names):
            return True
    return False
