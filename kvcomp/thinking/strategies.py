"""The table of strategies: their names, kinds and options, and which of them go together."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvcomp.hf.positions import fitting
from kvcomp.hf.run import Run
from kvcomp.thinking.ask import Ask
from kvcomp.thinking.cgrs import Cgrs
from kvcomp.thinking.checks import require
from kvcomp.thinking.concise_hint import ConciseHint
from kvcomp.thinking.dser import dser
from kvcomp.thinking.pdr import pdr, sr
from kvcomp.thinking.rows import Processors, Sampling, eos_of
from kvcomp.thinking.short_m import majority, short_m_at_k
from kvcomp.thinking.stand import Stand
from kvcomp.thinking.stopping import BudgetForcing, StopScale
from kvcomp.thinking.trajectory import latent_trajectory
from kvcomp.thinking.votes import AnswerOf, Result

# Keyword arguments that are no settings.
NOT_OPTIONS = ("answer_of", "place", "processors", "seed", "streamer")


@dataclass(frozen=True)
class Strategy:
    """A row of the table.

    Attributes:
        kind: "processor", a logits processor; "loop", a `custom_generate` of `generate`; "rows" and
            "rounds", which drive the model by prompt ids, and by texts that they ask.
        call: what makes it, or runs it.
        make: (run, tokenizer, columns of the prompt, options) -> a processor or loop.
        grows: it needs a cache that grows, so no compiled step.
        acts_at: an option that counts tokens, at which it acts.
    """

    kind: str
    call: Callable[..., Any]
    make: Callable[[Run, Any, int, Mapping[str, Any]], Any] | None = None
    grows: bool = False
    acts_at: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Name -> type."""
        function = self.call.__init__ if inspect.isclass(self.call) else self.call
        hints = typing.get_type_hints(function)
        return {
            name: hints[name]
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in NOT_OPTIONS
        }


def _by_prompt(kind: Callable[..., Any]) -> Callable[[Run, Any, int, Mapping[str, Any]], Any]:
    return lambda run, tokenizer, columns, options: kind(tokenizer, columns, **options)


# In the order in which processors act: what forces a token comes last.
STRATEGIES: dict[str, Strategy] = {
    "cgrs": Strategy(
        "processor", Cgrs, lambda run, words, columns, o: Cgrs(run, words, **o), grows=True
    ),
    "concise-hint": Strategy("processor", ConciseHint, _by_prompt(ConciseHint)),
    "stop-scale": Strategy("processor", StopScale, _by_prompt(StopScale)),
    "budget-forcing": Strategy("processor", BudgetForcing, _by_prompt(BudgetForcing)),
    "stand": Strategy("loop", Stand, lambda run, words, columns, o: Stand(**o), grows=True),
    "majority": Strategy("rows", majority),
    "short-m": Strategy("rows", short_m_at_k),
    "latent-trajectory": Strategy("rows", latent_trajectory, acts_at="at"),
    "pdr": Strategy("rounds", pdr),
    "sr": Strategy("rounds", sr),
    "dser": Strategy("rounds", dser),
}
WHILE_DECODING = [name for name, each in STRATEGIES.items() if each.kind in ("processor", "loop")]


@dataclass(frozen=True)
class Chosen:
    """Strategies that go together, with their options.

    Raises:
        ValueError: an unknown name or option, or strategies that exclude each other.
    """

    names: Sequence[str]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in [*self.names, *self.options]:
            require(name in STRATEGIES, "strategy", f"one of {', '.join(STRATEGIES)}", name)
        for name in self.names:
            require(self.names.count(name) == 1, "strategy", "each once", name)
        for name, given in self.options.items():
            require(name in self.names, f"{name}", "options of a chosen strategy", list(given))
            known = STRATEGIES[name].options
            for option in given:
                require(option in known, f"{name}", f"one of {', '.join(known)}", option)
        leading = [name for name in self.names if STRATEGIES[name].kind != "processor"]
        require(len(leading) < 2, "strategy", "one at most that leads", " and ".join(leading))

    def require_room(self, tokens: int, where: str) -> None:
        """Raise ValueError unless every strategy acts before the last token of a row of so many."""
        for name in self.names:
            if (option := STRATEGIES[name].acts_at) is not None:
                own = inspect.signature(STRATEGIES[name].call).parameters[option].default
                at = self.options.get(name, {}).get(option, own)
                known = f"fewer than the {tokens} tokens of a row"
                require(at < tokens, f"{where}: {name}.{option}", known, at)

    @property
    def leading(self) -> str | None:
        """The one that is no processor, if there is one."""
        found = [name for name in self.names if STRATEGIES[name].kind != "processor"]
        return found[0] if found else None

    def made(self, run: Run, tokenizer: Any, columns: int, kind: str) -> list[Any]:
        """The processors, or the loops, for prompts of so many columns."""
        found = []
        for name, each in STRATEGIES.items():
            if name in self.names and each.kind == kind and each.make is not None:
                found.append(each.make(run, tokenizer, columns, self.options.get(name, {})))
        return found

    def generation(self, run: Run, tokenizer: Any, columns: int) -> dict[str, Any]:
        """Keyword arguments of `generate`; of those that drive nothing."""
        processors = self.made(run, tokenizer, columns, "processor")
        loops = self.made(run, tokenizer, columns, "loop")
        given = {"logits_processor": processors} if processors else {}
        return given | ({"custom_generate": loops[0]} if loops else {})

    def drive(
        self,
        run: Run,
        tokenizer: Any,
        inputs: Any,
        question: str | None,
        *,
        chat: bool,
        answer_of: AnswerOf,
        **sampling: Any,
    ) -> Result:
        """Answer one prompt: by what leads, or by one row.

        Args:
            inputs: "input_ids" [1, n].
            question: its text, for those that ask in rounds.
        """
        processors: Processors = lambda columns: self.made(run, tokenizer, columns, "processor")  # noqa: E731
        name = self.leading or "majority"
        each, options = STRATEGIES[name], self.options.get(name, {})
        if each.kind == "loop":
            drawn = Sampling(**sampling)
            seeded = {"seed": drawn.seed, **options} if "seed" in each.options else options
            chosen = replace(self, options={**self.options, name: seeded})
            return chosen._generate(run, tokenizer, inputs, answer_of, drawn)
        if each.kind == "rounds":
            ask = Ask(run, tokenizer, chat=chat, processors=processors, **sampling)
            return each.call(ask, question, answer_of=answer_of, **options)
        more = {"answer_of": answer_of, "processors": processors} | sampling
        return each.call(run, tokenizer, inputs, **options, **more)

    def _generate(
        self, run: Run, tokenizer: Any, inputs: Any, answer_of: AnswerOf, sampling: Sampling
    ) -> Result:
        """One row by `generate`, whose loop a strategy replaces."""
        ids = inputs["input_ids"].to(run.model.device)
        columns, before = ids.shape[1], _forwards(run)
        config, most = run.model.config, sampling.max_new_tokens
        most = fitting(config, run.method, columns, most, "kvcomp.thinking: inputs")
        out = run.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **replace(sampling, max_new_tokens=most).for_generate(),
            **self.generation(run, tokenizer, columns),
        )
        written = out[0, columns:].tolist()
        text = tokenizer.decode(written, skip_special_tokens=False)
        answer = answer_of(text)
        return Result(
            text=text,
            answer=answer,
            votes={} if answer is None else {answer: 1},
            lengths=[len(written)],
            sequential_tokens=columns + len(written),
            total_tokens=columns + len(written),
            steps=_forwards(run) - before,
            finished=int(written[-1] in eos_of(run.model)),
            rows=1,
        )


def _forwards(run: Run) -> int:
    """Decode forwards so far of runs of single rows: an accepted draft is a step without one."""
    return run.meter.steps - run.meter.accepted_tokens
