"""The demo: problems for the bundled reasoner, decoded with every method and graded.

All methods greedily decode the same batch of problems (`kvcomp.reasoner.task`). The steps are
graded against the prompt, and the run counts tokens and bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from kvcomp import METHODS, Method
from kvcomp.comparison import Bars, chart, dtypes, machine, methods_table, plural, steps_bar
from kvcomp.hf import patch
from kvcomp.reasoner import path, task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUDGET_SHARE = 2  # the default budget is the final context over this,
BUDGET_STEP = 16  # rounded down to a multiple of this, so that pages of every method fit
WARM_UP_TOKENS = 4
FIGURES = (
    "attended_ratio",
    "kv_bytes_peak",
    "kv_bytes_read_per_token",
    "tokens_per_second",
    "tokens_decoded",
    "decode_seconds",
)


@dataclass(frozen=True)
class Settings:
    """What to decode. With a budget of None it is half of the final context."""

    problems: int = 8
    nodes: int = 16
    steps: int = 256
    seed: int = 0
    budget: int | None = None
    device: str = "cpu"
    dtype: str | None = None  # float32 on a CPU, bfloat16 on a GPU
    kv: str = "model"


class Workload:
    """The model and one batch of problems, to be decoded with any number of methods."""

    def __init__(self, settings: Settings) -> None:
        self.device = torch.device(settings.device)
        self.kv = settings.kv
        default = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtype = settings.dtype or default
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(path())
        # Any: by its annotations, what `from_pretrained` returns could not `generate`
        self.model: Any
        self.model = AutoModelForCausalLM.from_pretrained(path(), dtype=self.dtype)
        self.model.to(self.device).eval()
        self.problems = [
            task.make_problem(settings.nodes, settings.steps, settings.seed + i)
            for i in range(settings.problems)
        ]
        self.inputs = self._tokens([problem.prompt for problem in self.problems])
        self.prompt_tokens = self.inputs["input_ids"].shape[1]
        self.new_tokens = settings.steps * self.problems[0].tokens_per_step
        self.context = self.prompt_tokens + self.new_tokens
        longest = self.model.config.max_position_embeddings
        if self.context + WARM_UP_TOKENS > longest:
            raise ValueError(
                f"kvcomp: --steps: expected a context of at most {longest} tokens, got"
                f" {self.context} with {settings.steps} steps"
            )
        self.budget = settings.budget or max(
            self.context // BUDGET_SHARE // BUDGET_STEP * BUDGET_STEP, BUDGET_STEP
        )

    def warm_up(self, method: Method) -> None:
        """Continue the correct answers a little, so that the run finds everything compiled."""
        answered = self._tokens([f"{p.prompt} {p.gold()}" for p in self.problems])
        with patch(self.model, method, kv=self.kv):
            self.model.generate(**answered, do_sample=False, max_new_tokens=WARM_UP_TOKENS)

    def decode(self, method: Method, advance: Callable[[], None]) -> dict[str, Any]:
        """Decode and grade: one row of the result. Calls `advance` at each step."""
        with patch(self.model, method, kv=self.kv) as run:
            output = self.model.generate(
                **self.inputs,
                do_sample=False,
                max_new_tokens=self.new_tokens,
                streamer=_Ticker(advance),
            )
        texts = self.tokenizer.batch_decode(
            output[:, self.prompt_tokens :], skip_special_tokens=True
        )
        grades = [task.grade(p, text) for p, text in zip(self.problems, texts, strict=True)]
        figures = run.report().to_dict()
        return {
            "method": method.name,
            "parameters": str(method),
            "baseline": method.baseline,
            "step_accuracy": mean(grade.step_accuracy for grade in grades),
            "final_accuracy": mean(float(grade.final_correct) for grade in grades),
            **{name: figures[name] for name in FIGURES},
        }

    def _tokens(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, return_tensors="pt", padding=True).to(self.device)


class _Ticker(BaseStreamer):
    """A streamer that only counts: `generate` calls it with the prompt and at each step."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance

    def put(self, value: torch.Tensor) -> None:
        self.advance()

    def end(self) -> None:
        pass


def run(names: list[str], settings: Settings, console: Console) -> Iterator[dict[str, Any]]:
    """Decode with each of the methods `names`; a progress bar goes to `console`.

    Yields:
        after each method, the result so far: {"meta": {...}, "rows": [{"method", "step_accuracy",
        ...}]}, in the order of `names`.

    Raises:
        ValueError: a budget that a method cannot use, or a context too long for the model.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such a small model gains nothing from more
    try:
        yield from _run(names, settings, console)
    finally:
        torch.set_num_threads(threads)


def _run(names: list[str], settings: Settings, console: Console) -> Iterator[dict[str, Any]]:
    work = Workload(settings)
    methods = [METHODS[name].example(work.budget) for name in names]
    bar = steps_bar(console)
    rows: list[dict[str, Any]] = []
    result = {"meta": _meta(settings, work), "rows": rows}
    with bar:
        total = bar.add_task("", total=len(methods) * (work.new_tokens + 1))
        for method in methods:
            bar.update(total, description=method.name)
            work.warm_up(method)
            rows.append(work.decode(method, lambda: bar.advance(total)))
            yield result


def _meta(settings: Settings, work: Workload) -> dict[str, Any]:
    return {
        **machine(work.device),
        "model": "reasoner",
        **asdict(settings),
        "dtype": work.dtype,
        "budget": work.budget,
        "prompt_tokens": work.prompt_tokens,
        "new_tokens": work.new_tokens,
        "context": work.context,
    }


def headline(result: dict[str, Any]) -> str:
    """Problems, context, budget, data types and device, in one line."""
    meta = result["meta"]
    return (
        f"{plural(meta['problems'], 'problem')} of {meta['nodes']} nodes,"
        f" {plural(meta['steps'], 'step')} each:"
        f" {meta['context']} tokens of context, budget {meta['budget']};"
        f" {dtypes(meta)} on {meta['device_name']}"
    )


def table(result: dict[str, Any]) -> Table:
    """One row per method: correct steps, answers with all steps correct, tokens, bytes, rate."""
    return methods_table(
        ("steps", "answers", "attended", "KV peak", "KV read/token", "tokens/s"),
        (
            (
                row["method"],
                f"{row['step_accuracy']:.1%}",
                f"{row['final_accuracy']:.0%}",
                f"{row['attended_ratio']:.0%}",
                f"{row['kv_bytes_peak'] / 2**20:.1f} MiB",
                f"{row['kv_bytes_read_per_token'] / 2**10:.0f} KiB",
                f"{row['tokens_per_second']:.0f}",
            )
            for row in result["rows"]
        ),
    )


def plot(result: dict[str, Any]) -> bytes:
    """A PNG with two bars per method: correct steps, and tokens attended."""
    rows, meta = result["rows"], result["meta"]
    steps, attended = (
        Bars(title, [100 * row[key] for row in rows], "{:.1f} %", (0, 122))
        for key, title in (
            ("step_accuracy", "correct steps"),
            ("attended_ratio", "tokens attended (100 % = dense)"),
        )
    )
    problems = plural(meta["problems"], "problem")
    title = f"budget {meta['budget']} of {meta['context']} tokens, {problems}"
    return chart(rows, steps, attended, title)
