"""Bad input, a row each: one line of error as the table says, and all is as it was before."""

from importlib import import_module
from importlib.util import find_spec

import pytest

from bad_input import Attempt, op_calls
from kvcomp.ops import OPS

pytestmark = pytest.mark.usefixtures("one_thread")

TABLES = {  # -> packages without which there is nothing to try
    "attention_ops": (),
    "selection_ops": (),
    "ops": (),
    "op_arguments": (),
    "methods": (),
    "hf": ("transformers",),
    "commands": ("transformers", "typer"),
    "library": ("transformers", "openai"),
    "trace_log": ("transformers", "openai"),
}


def rows():
    for name, needed in TABLES.items():
        if all(find_spec(package) for package in needed):
            for number, row in enumerate(import_module(f"bad_input.{name}").ROWS):
                yield pytest.param(row, id=f"{name} {number}: {row.match[:60]}")


@pytest.mark.parametrize("row", list(rows()))
def test_bad_input(row):
    attempt: Attempt = row.make()
    try:
        before = attempt.state()
        with pytest.raises(row.error, match=row.match) as error:
            attempt.run()
        assert type(error.value) is row.error
        assert str(error.value).startswith("kvcomp") and "\n" not in str(error.value)
        assert attempt.state() == before, "something is lost"
    finally:
        attempt.close()


@pytest.mark.parametrize("op", OPS)
def test_good_input_is_good(op):
    """The rows about ops change one thing at a time of calls that work."""
    getattr(op_calls, op)().run()
