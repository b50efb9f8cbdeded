"""One chunk from an OpenAI-compatible completions endpoint, as token ids or as text.

Token ids are exact: the server reads the prompt as ids and returns the ids that it sampled (vLLM
and recent SGLang do, with `return_token_ids`), and each answer names the prompt it belongs to. Text
passes through the tokenizer twice, so the ids that come back may differ from the sampled ones; the
visible part of the difference is counted as drift.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import openai

from kvcomp.checks import require, require_one_of
from kvcomp.problems import is_token_ids

TOKENS = ("auto", "ids", "text")
ONE_PROBLEM = (400, 413, 422, 500)  # HTTP statuses that may concern one problem and no other
PROBE = 8  # prompt tokens of the request that tests a server
RESERVED = {  # request fields that `Sampling.extra` must not contain -> why
    **dict.fromkeys(("model", "prompt", "max_tokens"), "is set for every chunk"),
    **dict.fromkeys(("temperature", "top_p", "seed"), "is a field of Sampling"),
    **dict.fromkeys(("n", "best_of", "echo", "stream", "return_token_ids"), "changes the answer"),
}


class EngineError(RuntimeError):
    """A request that failed after the client's retries. `everyone`: every other one would too."""

    def __init__(self, message: str, everyone: bool = False) -> None:
        super().__init__(message)
        self.everyone = everyone


@dataclass(frozen=True)
class Sampling:
    """How the server samples tokens. The defaults are the paper's.

    Attributes:
        temperature: at least 0; 0 is greedy.
        top_p: more than 0, at most 1.
        top_k: -1 turns it off, None leaves it to the server. OpenAI's API has no such field, so
            it is sent together with token ids only, to servers that understand both.
        seed: every chunk gets its own seed, derived from this one; None: the server chooses.
        extra: more fields of the request, by the server's names. The request that tests the server
            is sent without them.

    Raises:
        ValueError: a value out of range, or a field in `extra` that every chunk sets.
    """

    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int | None = -1
    seed: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def check(condition: bool, field: str, expected: str) -> None:
            require(condition, f"kvcomp.Sampling: {field}", expected, getattr(self, field))

        check(
            is_number(self.temperature) and 0 <= self.temperature < math.inf,
            "temperature",
            "at least 0",
        )
        check(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "more than 0, at most 1")
        check(
            self.top_k is None or (type(self.top_k) is int and self.top_k >= -1),
            "top_k",
            "-1, a number of tokens, or None",
        )
        check(self.seed is None or type(self.seed) is int, "seed", "an integer, or None")
        check(isinstance(self.extra, dict), "extra", "a dict of request fields")
        for name in self.extra.keys() & RESERVED.keys():
            raise ValueError(f"kvcomp.Sampling: extra: {name!r} {RESERVED[name]}")


class Answer(NamedTuple):
    ids: list[int]
    finish: str  # "stop" or "length"
    drift: int


class Reading(NamedTuple):
    """Content of an answer. `written`: new tokens by the server's count; None: it gives none."""

    ids: list[int]
    written: int | None
    drift: int


Reader = Callable[[Any, Any], Reading]  # of a choice and the usage


class Engine:
    """A model behind `client`, with the client's time-outs and retries.

    Attributes:
        tokens: "ids" or "text" once `settle` has run.
        reason: why "auto" chose text; None if it did not.
        context: the model's context length on the server, in tokens; None: the server does not say.
    """

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        model: str,
        sampling: Sampling,
        tokenizer: Any = None,
        tokens: str = "auto",
        eos: Collection[int] | None = None,
    ) -> None:
        require_one_of(TOKENS, "kvcomp.delethink: tokens", tokens)
        if tokens == "text" and tokenizer is None:
            raise ValueError("kvcomp.delethink: tokens='text' needs a tokenizer")
        self.client, self.model, self.sampling = client, model, sampling
        self.tokenizer, self.tokens = tokenizer, tokens
        self.reason: str | None = None
        self.context: int | None = None
        own = getattr(tokenizer, "eos_token_id", None)
        self.eos = frozenset(eos if eos is not None else [] if own is None else [own])

    async def settle(self, prompt: Sequence[int]) -> None:
        """Ask for one token and for the context length: is the server up, does it take ids?

        A server that is down now is an error at once; only one that goes away later is waited for.

        Raises:
            EngineError: no usable answer, neither to ids nor to text.
        """
        client = self.client
        self.client = client.with_options(max_retries=min(client.max_retries, 2))
        try:
            await self._try(prompt[:PROBE])
            self.context = await self._context()
        except EngineError as error:
            raise EngineError(f"kvcomp.delethink: {error}", error.everyone) from error
        finally:
            self.client = client

    async def _try(self, prompt: Sequence[int]) -> None:
        if self.tokens == "auto":
            self.tokens = "ids"
            try:
                await self._complete(prompt, 1, {})
                return
            except EngineError as error:
                if error.everyone or self.tokenizer is None:
                    raise
                self.tokens, self.reason = "text", str(error)
        await self._complete(prompt, 1, {})  # without `extra`: min_tokens, say, refuses one token

    async def _context(self) -> int | None:
        """`max_model_len` of the model in the server's list, as vLLM and SGLang have it."""
        client = self.client.with_options(max_retries=0)
        try:
            models = (await client.models.list()).data
        except (openai.APIError, ValueError, TypeError, AttributeError):
            return None  # the completions endpoint is all that a server must have
        for model in models if isinstance(models, list) else []:
            limit = getattr(model, "max_model_len", None)
            if getattr(model, "id", None) == self.model and type(limit) is int and limit > 0:
                return limit
        return None

    def require_context(self, prompt: int, new: int) -> None:
        """Refuse a chunk of `new` tokens of output behind a prompt before it is sent.

        Raises:
            EngineError: the server's context is known, and shorter.
        """
        if self.context is not None and prompt + new > self.context:
            raise EngineError(
                f"a prompt of {prompt} tokens and a chunk of {new} need {prompt + new}, but the"
                f" server's context (max_model_len) is {self.context}"
            )

    async def complete(self, context: Sequence[int], limit: int, seed: int | None = None) -> Answer:
        """Generate up to `limit` new tokens after `context`.

        Raises:
            EngineError: the server cannot be reached, is too slow, refuses, or does not answer
                exactly this request.
        """
        return await self._complete(context, limit, self.sampling.extra, seed)

    async def _complete(
        self,
        context: Sequence[int],
        limit: int,
        extra: dict[str, Any],
        seed: int | None = None,
    ) -> Answer:
        context = list(context)
        request, read = self._ids(context) if self.tokens == "ids" else self._text(context)
        request["extra_body"] = request.get("extra_body", {}) | extra
        answer = await self._post(request, limit, seed)
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list) or len(choices) != 1:
            got = f"{len(choices)} choices" if isinstance(choices, list) else repr(answer)
            raise EngineError(f"the server's answer is no completion: {shorten(got)}")
        finish = getattr(choices[0], "finish_reason", None)
        if finish not in ("stop", "length"):
            raise EngineError(f"finish_reason: expected stop or length, got {finish!r}")
        ids, written, drift = read(choices[0], getattr(answer, "usage", None))
        if written is not None and written > limit:
            raise EngineError(f"the server wrote {written} tokens, but the limit was {limit}")
        if ids and ids[-1] in self.eos:
            finish = "stop"  # engines look at the limit first, and then call it "length"
        if finish == "length" and written is not None and written < limit:
            raise EngineError(self._too_short(written, limit, len(context) + limit))
        return Answer(ids, finish, drift)

    def _too_short(self, written: int, limit: int, needed: int) -> str:
        """The message for a server that shortened `max_tokens` and did not say so."""
        found = f"the server stopped after {written} of {limit} tokens"
        if self.context is not None and needed <= self.context:
            return (
                f"{found}, although its context of {self.context} has room for the {needed} that"
                " this chunk needs: does it limit new tokens (max_new_tokens in its generation"
                " config)?"
            )
        return (
            f"{found}: is its context shorter than the {needed} tokens that this chunk needs, or"
            " does it limit new tokens?"
        )

    def _ids(self, context: list[int]) -> tuple[dict[str, Any], Reader]:
        fields: dict[str, Any] = {"return_token_ids": True}
        if self.sampling.top_k is not None:
            fields["top_k"] = self.sampling.top_k

        def read(choice: Any, usage: Any) -> Reading:
            ids = getattr(choice, "token_ids", None)
            if ids is None or not is_token_ids(ids):
                raise EngineError("the server returned no token ids")
            seen = getattr(choice, "prompt_token_ids", None)
            same = seen == context if seen is not None else _prompt_count(usage) == len(context)
            if not same:
                raise EngineError("the server did not read the prompt as the token ids it was sent")
            return Reading(list(ids), len(ids), 0)

        return {"prompt": context, "extra_body": fields}, read

    def _text(self, context: list[int]) -> tuple[dict[str, Any], Reader]:
        text = self._decode(context)
        back = list(self.tokenizer(text)["input_ids"])

        def read(choice: Any, usage: Any) -> Reading:
            new = getattr(choice, "text", None)
            if not isinstance(new, str):
                raise EngineError(f"the server returned no text: {shorten(repr(choice))}")
            ids = list(self.tokenizer(new, add_special_tokens=False)["input_ids"])
            counted = _prompt_count(usage)
            missed = 0 if counted is None else abs(counted - len(back))
            if missed > 1:  # one may be a start token that only one of the two adds
                raise EngineError(
                    f"the server counts {counted} tokens in a prompt, the tokenizer {len(back)}:"
                    " is it the model's tokenizer?"
                )
            written = getattr(usage, "completion_tokens", None)
            lost = 0 if written is None else abs(written - len(ids))
            if lost == 1 and choice.finish_reason == "stop":
                lost = 0  # the end token, which is counted and not shown
            return Reading(ids, written, changed(context, back) + missed + lost)

        return {"prompt": text}, read

    def _decode(self, ids: list[int]) -> str:
        """Text that the server will read as `ids`, without the start token, which it adds."""
        start = list(self.tokenizer("")["input_ids"])
        if start and ids[: len(start)] == start:
            ids = ids[len(start) :]
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    async def _post(self, request: dict[str, Any], limit: int, seed: int | None) -> Any:
        where = self.client.base_url
        if seed is not None:
            request["seed"] = seed
        try:
            return await self.client.completions.create(
                model=self.model,
                max_tokens=limit,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                **request,
            )
        except openai.APITimeoutError as error:
            raise EngineError(
                f"no answer from {where} within the client's time-out, {self.client.timeout}",
                everyone=True,
            ) from error
        except openai.APIConnectionError as error:
            raise EngineError(
                f"cannot reach {where}: {shorten(str(error.__cause__ or error))}", everyone=True
            ) from error
        except openai.APIStatusError as error:
            raise EngineError(
                f"{where} answers HTTP {error.status_code}: {shorten(error.response.text)}",
                everyone=error.status_code not in ONE_PROBLEM,
            ) from error
        except (openai.APIError, ValueError) as error:  # a body that is not what it says it is
            raise EngineError(f"the server's answer is no completion: {error}") from error


def changed(before: Sequence[int], after: Sequence[int]) -> int:
    """The number of tokens between the common start and the common end of two lists."""
    shorter, longer = sorted((len(before), len(after)))
    start = 0
    while start < shorter and before[start] == after[start]:
        start += 1
    end = 0
    while end < shorter - start and before[-1 - end] == after[-1 - end]:
        end += 1
    return longer - start - end


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shorten(text: str) -> str:
    return textwrap.shorten(text, 300, placeholder=" ...")


def _prompt_count(usage: Any) -> int | None:
    return getattr(usage, "prompt_tokens", None)
