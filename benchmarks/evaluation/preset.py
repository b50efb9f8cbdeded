"""What a preset is: the settings of one published measurement, and the figures beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.problems import TEMPLATE, Problem, load
from kvcomp import Full, Method

Make = Callable[[str, int], Method]  # from a model's name and a budget


@dataclass(frozen=True)
class Data:
    """A set of problems, which the user brings.

    Attributes:
        size: how many problems it has.
        fields: of a line of its public file; `problems.FIELDS` has the other names that are read.
    """

    name: str
    size: int
    fields: tuple[str, ...]
    checker: str = "math"
    template: str = TEMPLATE


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; None leaves temperature, top-p and top-k to the model's own
    generation config."""

    max_new_tokens: int
    temperature: float | None = 0.0
    top_p: float | None = None
    top_k: int | None = None  # 0 is off
    samples: int = 1  # of each problem

    def __str__(self) -> str:
        how = {None: "the model's own", 0: "greedy"}.get(self.temperature)
        if how is None:
            how = f"T {self.temperature}, top-p {self.top_p}, {self.samples} samples"
        return f"{how}; {self.max_new_tokens:,}"


@dataclass(frozen=True)
class Paper:
    """Where settings and figures are from, and what is not said there."""

    name: str
    source: str
    note: str


@dataclass(frozen=True)
class Preset:
    """What a paper measured, as far as it is known.

    Attributes:
        budgets: by model, what the methods get: tokens, or a share of the mean length (prompt and
            output) of the full cache's own runs. The models are named as on their hub.
        rows: by name, the paper's method and its baselines.
        published: by model and label (as `methods` has them), accuracy in %, as the source has it.
        note: what is not said of this one, and figures that have no row.
        dtype: of weights and cache.
    """

    name: str
    paper: Paper
    data: Data
    sampling: Sampling
    budgets: Mapping[str, tuple[int | float, ...]]
    rows: Mapping[str, Make]
    published: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    note: str = ""
    dtype: str = "bfloat16"

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self.budgets)

    def load(self, path: str | Path, count: int | None = None) -> list[Problem]:
        """The problems of a file, asked and graded as here; see `problems.load`."""
        data = self.data
        return load(path, checker=data.checker, template=data.template, count=count)

    def full_model_name(self, model: str) -> str:
        """The one of `models` that a hub name or a folder stands for, by its last part.

        Raises:
            ValueError: the preset has no such model.
        """
        for name in self.models:
            if short(name).lower() == short(model).lower():
                return name
        raise ValueError(
            f"kvcomp.accuracy: preset {self.name}: model: expected one of"
            f" {', '.join(self.models)}, or a folder of that name, got {model!r}"
        )

    def needs_length(self, model: str) -> bool:
        """Whether a budget is a share, so that `methods` must know the full cache's length."""
        return any(isinstance(x, float) for x in self.budgets[self.full_model_name(model)])

    def methods(self, model: str, length: float | None = None) -> dict[str, Method]:
        """By label ("delta 1024", "lazy-eviction 30%"), the full cache first.

        Args:
            length: mean tokens, prompt and output, of the full cache's runs on the same problems;
                None leaves out the budgets that are shares of it (see `needs_length`).

        Raises:
            ValueError: the preset has no such model, or a share is too small for its method.
        """
        model = self.full_model_name(model)
        methods: dict[str, Method] = {"full": Full()}
        for budget in self.budgets[model]:
            if isinstance(budget, int):
                tokens = budget
            elif length is not None:
                tokens = round(budget * length)
            else:
                continue
            rows = {row: make(model, tokens) for row, make in self.rows.items()}
            methods |= {f"{row} {_size(budget)}": method for row, method in rows.items()}
        return methods

    def figures(self, model: str) -> Mapping[str, str]:
        """By label, the published accuracy of a model."""
        return self.published.get(self.full_model_name(model), {})


def short(model: str) -> str:
    """The last part of a hub name or path."""
    return model.rstrip("/").rsplit("/", 1)[-1]


def settings_table(presets: Iterable[Preset]) -> str:
    """What each preset runs, in Markdown."""
    lines = [
        "| preset | problems | models | rows beside `full` | budgets | sampling; tokens |",
        "|---|---|---|---|---|---|",
    ]
    for preset in presets:
        sizes = dict.fromkeys(_size(x) for given in preset.budgets.values() for x in given)
        lines.append(
            f"| `{preset.name}` | {preset.data.name}: {preset.data.size} |"
            f" {', '.join(map(_row_name, preset.models))} |"
            f" {', '.join(f'`{row}`' for row in preset.rows)} | {', '.join(sizes)} |"
            f" {preset.sampling} |"
        )
    return "\n".join(lines)


def figures_table(presets: Iterable[Preset]) -> str:
    """What was published for each, in Markdown."""
    lines = ["| preset | model | published, % |", "|---|---|---|"]
    for preset in presets:
        for model, figures in preset.published.items():
            said = ", ".join(f"`{label}` {figure}" for label, figure in figures.items())
            lines.append(f"| `{preset.name}` | {_row_name(model)} | {said} |")
    return "\n".join(lines)


def _row_name(model: str) -> str:
    return short(model).removeprefix("DeepSeek-")


def _size(budget: int | float) -> str:
    return str(budget) if isinstance(budget, int) else f"{budget:.0%}"
