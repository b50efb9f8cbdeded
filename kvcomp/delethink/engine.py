"""One chunk from an OpenAI-compatible completions endpoint, as token ids or as text.

Ids are exact: the engine reads the prompt as ids and returns the ids that it sampled (vLLM and
recent SGLang, asked with `return_token_ids`), and each answer says which prompt it belongs to. Text
goes through the tokenizer twice, so the ids that come back need not be those that were sampled:
what can be seen of the difference is counted as drift.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import openai

from kvcomp.delethink.problems import is_token_ids

TOKENS = ("auto", "ids", "text")
ONE_PROBLEM = (400, 413, 422, 500)  # HTTP statuses that may concern one problem and no other
PROBE = 8  # tokens of the prompt with which a server is tried


class EngineError(RuntimeError):
    """A request that failed, after the client's retries. `everyone`: others would fare the same."""

    def __init__(self, message: str, everyone: bool = False) -> None:
        super().__init__(message)
        self.everyone = everyone


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are the paper's; temperature 0 is greedy.

    Attributes:
        top_k: -1 for off, None to leave it to the server. OpenAI's API has no such field, so it
            is sent with ids only, to engines that have.
        seed: each chunk gets one of its own that follows from it; None: the engine's choice.
        extra: further fields of the request, in the engine's own words.
    """

    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int | None = -1
    seed: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"kvcomp.Sampling: temperature: expected at least 0, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"kvcomp.Sampling: top_p: expected more than 0, at most 1, got {self.top_p}"
            )


class Answer(NamedTuple):
    ids: list[int]
    finish: str  # "stop" or "length"
    drift: int


class Reading(NamedTuple):
    """What an answer holds; written: tokens by the server's own count, None where it has none."""

    ids: list[int]
    written: int | None
    drift: int


Reader = Callable[[Any, Any], Reading]  # of a choice and the usage


class Engine:
    """A model behind `client`; its time-outs and retries are the client's.

    Attributes:
        tokens: "ids" or "text" once `settle` has run.
        reason: why it is text, where "auto" found that it must be.
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
        if tokens not in TOKENS:
            raise ValueError(
                f"kvcomp.delethink: tokens: expected one of {', '.join(TOKENS)}, got {tokens!r}"
            )
        if tokens == "text" and tokenizer is None:
            raise ValueError("kvcomp.delethink: tokens='text' needs a tokenizer")
        self.client, self.model, self.sampling = client, model, sampling
        self.tokenizer, self.tokens, self.reason = tokenizer, tokens, None
        own = getattr(tokenizer, "eos_token_id", None)
        self.eos = frozenset(eos if eos is not None else [] if own is None else [own])

    async def settle(self, prompt: Sequence[int]) -> None:
        """Ask for one token, before the work: is the server there, and does it take ids?

        A server that is down now is an error at once; only one that goes away later is waited for.

        Raises:
            EngineError: no usable answer, be it to ids or to text.
        """
        client = self.client
        self.client = client.with_options(max_retries=min(client.max_retries, 2))
        try:
            await self._try(prompt[:PROBE])
        except EngineError as error:
            raise EngineError(f"kvcomp.delethink: {error}", error.everyone) from error
        finally:
            self.client = client

    async def _try(self, prompt: Sequence[int]) -> None:
        if self.tokens == "auto":
            self.tokens = "ids"
            try:
                await self.complete(prompt, 1)
                return
            except EngineError as error:
                if error.everyone or self.tokenizer is None:
                    raise
                self.tokens, self.reason = "text", str(error)
        await self.complete(prompt, 1)

    async def complete(self, context: Sequence[int], limit: int, seed: int | None = None) -> Answer:
        """Up to `limit` new tokens behind `context`.

        Raises:
            EngineError: the server is out of reach, too slow, refuses, or its answer is not one
                to exactly this request.
        """
        context = list(context)
        request, read = self._ids(context) if self.tokens == "ids" else self._text(context)
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
            raise EngineError(f"the server wrote {written} tokens, where {limit} were the limit")
        if ids and ids[-1] in self.eos:
            finish = "stop"  # engines look at the limit first, and then call it "length"
        if finish == "length" and written is not None and written < limit:
            raise EngineError(
                f"the server stopped after {written} of {limit} tokens: is its context shorter"
                f" than the {len(context) + limit} tokens that this chunk needs?"
            )
        return Answer(ids, finish, drift)

    def _ids(self, context: list[int]) -> tuple[dict[str, Any], Reader]:
        fields: dict[str, Any] = {"return_token_ids": True}
        if self.sampling.top_k is not None:
            fields["top_k"] = self.sampling.top_k

        def read(choice: Any, usage: Any) -> Reading:
            ids = getattr(choice, "token_ids", None)
            if not is_token_ids(ids):
                raise EngineError("the server returned no token ids")
            seen = getattr(choice, "prompt_token_ids", None)
            same = seen == context if seen is not None else _prompt_count(usage) == len(context)
            if not same:
                raise EngineError("the server did not read the prompt as the token ids it was sent")
            return Reading(list(ids), len(ids), 0)

        return {"prompt": context, "extra_body": fields | self.sampling.extra}, read

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
                    f"the server counts {counted} tokens in a prompt where the tokenizer has"
                    f" {len(back)}: is it the model's tokenizer?"
                )
            written = getattr(usage, "completion_tokens", None)
            lost = 0 if written is None else abs(written - len(ids))
            if lost == 1 and choice.finish_reason == "stop":
                lost = 0  # the end token, which is counted and not shown
            return Reading(ids, written, changed(context, back) + missed + lost)

        return {"prompt": text, "extra_body": self.sampling.extra}, read

    def _decode(self, ids: list[int]) -> str:
        """Text that the server will read as `ids`, without the start token that it adds itself."""
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
    """How many tokens differ between the common start of two lists and their common end."""
    shorter, longer = sorted((len(before), len(after)))
    start = 0
    while start < shorter and before[start] == after[start]:
        start += 1
    end = 0
    while end < shorter - start and before[-1 - end] == after[-1 - end]:
        end += 1
    return longer - start - end


def shorten(text: str) -> str:
    return textwrap.shorten(text, 300, placeholder=" ...")


def _prompt_count(usage: Any) -> int | None:
    return getattr(usage, "prompt_tokens", None)
