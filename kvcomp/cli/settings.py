"""Methods and strategies from the options of a command."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcomp import METHODS, Method
from kvcomp.checks import require_one_of

if TYPE_CHECKING:
    from kvcomp.thinking import Chosen

Budget = Annotated[
    int | None,
    typer.Option(help="Tokens a layer keeps or attends to; default: the method's own."),
]
Chunk = Annotated[
    int | None, typer.Option(help="Delethink only: tokens that the first chunk generates.")
]
Carry = Annotated[
    int | None,
    typer.Option(
        help="Delethink only: output tokens carried into the next chunk; default: half of --chunk."
    ),
]
Inner = Annotated[
    str | None,
    typer.Option(
        help="Delethink only: the method used within each chunk; --budget applies to it.",
        metavar="NAME",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set any other field of the method; inner.FIELD=VALUE sets a field of the inner"
        " method.",
        metavar="FIELD=VALUE",
    ),
]
With = Annotated[
    list[str] | None,
    typer.Option("--with", help="Set an option of a strategy.", metavar="NAME.OPTION=VALUE"),
]


def pick_method(name: str) -> type[Method]:
    require_one_of(METHODS, "kvcomp: --method", name)
    return METHODS[name]


def chunk_options(chunk: int | None, carry: int | None) -> dict[str, int | None]:
    """--chunk and --carry; a carry that is not given is half a chunk."""
    return {"chunk": chunk, "carry": chunk // 2 if chunk and carry is None else carry}


def build_method(
    name: str,
    model: str,
    budget: int | None,
    settings: list[str],
    chunks: dict[str, int | None],
    inner: str | None,
) -> Method:
    """The method `name` with its published settings for the model and the options given."""
    cls = pick_method(name)
    hints = typing.get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    given: dict[str, Any] = {}
    if inner is not None:
        own = [text for text in settings if not text.startswith("inner.")]
        rest = [text.removeprefix("inner.") for text in settings if text not in own]
        given["inner"] = build_method(inner, model, budget, rest, {}, None)
        budget, settings = None, own
    options = {name: value for name, value in chunks.items() if value is not None}
    for option, value in (options if budget is None else {**options, "budget": budget}).items():
        if option not in fields:
            raise ValueError(f"kvcomp: --{option}: method {name!r} has none")
        given[option] = value
    if "inner" in given and "inner" not in fields:
        raise ValueError(f"kvcomp: --inner: method {name!r} has none")
    for setting in settings:
        field, _, text = setting.partition("=")
        if field not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(f"kvcomp: --set: {name!r} has no field {field!r}; it has: {known}")
        given[field] = parse(setting, fields[field], text)
    return cls.for_model(model, **given)


def parse(setting: str, hint: Any, text: str, option: str = "--set") -> Any:
    """`text` as a value of a field's type: a number, word, flag, tuple (1,2,3) or none."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    if type(None) in options and text.lower() == "none":
        return None
    kind = next(option for option in options if option is not type(None))
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(typing.get_args(kind)[0](part) for part in text.split(","))
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
    except (ValueError, KeyError):
        pass
    raise ValueError(
        f"kvcomp: {option} {setting}: expected a value of type {getattr(hint, '__name__', hint)}"
    )


def choose(names: list[str], settings: list[str], *, while_decoding: bool = False) -> Chosen:
    """The strategies of the options --strategy and --with.

    Raises:
        ValueError: an unknown one, one that is not for this command, or a bad option.
    """
    from kvcomp.thinking.strategies import STRATEGIES, WHILE_DECODING, Chosen

    known = WHILE_DECODING if while_decoding else list(STRATEGIES)
    for name in names:
        if name not in known:
            if name in STRATEGIES:
                wanted = f"expected one of {', '.join(known)}"
                raise ValueError(f"kvcomp: --strategy: {wanted}, got {name!r}; use kvcomp think")
            require_one_of(known, "kvcomp: --strategy", name)
    options: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, _, rest = setting.partition(".")
        option, _, text = rest.partition("=")
        if name not in STRATEGIES or "=" not in rest:
            raise ValueError(f"kvcomp: --with: expected NAME.OPTION=VALUE, got {setting!r}")
        if name not in names:
            raise ValueError(f"kvcomp: --with {setting}: expected --strategy {name} too, got none")
        kinds = STRATEGIES[name].options
        if option not in kinds:
            has = ", ".join(kinds)
            raise ValueError(f"kvcomp: --with: {name!r} has no option {option!r}; it has: {has}")
        value = parse(setting, kinds[option], text, "--with")
        options.setdefault(name, {})[option] = value
    return Chosen(names, options)
