"""The loop: many traces at once, chunk after chunk; every finished chunk goes to the log."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import openai

from kvcomp.checks import require
from kvcomp.delethink.engine import Engine, EngineError, Sampling
from kvcomp.delethink.log import Log, Record, fingerprint
from kvcomp.delethink.results import Run, Trace, TraceError
from kvcomp.methods.delethink import Chunk, Delethink
from kvcomp.problems import Problem, prepare
from kvcomp.progress import Tell, progress_bar


async def trace(
    client: openai.AsyncOpenAI,
    problems: Iterable[Mapping[str, Any]],
    method: Delethink | None = None,
    *,
    model: str,
    log: str | Path,
    tokenizer: Any = None,
    tokens: str = "auto",
    eos: Collection[int] | None = None,
    sampling: Sampling | None = None,
    samples: int = 1,
    concurrency: int = 32,
    progress: bool = False,
) -> Run:
    """Run Delethink on a server for all `problems`, many at once.

        client = openai.AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none",
                                    timeout=1800, max_retries=40)
        run = asyncio.run(kvcomp.delethink.trace(client, problems, kvcomp.Delethink(),
                                                 model=name, log="run.jsonl", tokenizer=tokenizer))

    Args:
        client: its `timeout` (seconds) applies to each chunk; make it ample, because a request
            that timed out is sent again. Its `max_retries`, at most 8 s apart, decide how long to
            wait for a server that restarts: 40 retries are about five minutes.
        problems: mappings with an "id", and a "prompt" (text), "messages" (for the tokenizer's chat
            template) or "ids" (token ids).
        method: the schedule; default: the published one, 5 chunks of 8192 tokens, 4096 carried.
        model: the model's name on the server.
        log: JSONL file; a run with the same log resumes where the last one stopped. `max_chunks`,
            `samples`, `concurrency` and the problems may change in between, nothing else.
        tokenizer: the model's, as transformers loads it; not needed if all problems are ids and
            the server takes and returns ids.
        tokens: "ids"; "text", for servers that cannot do ids (an end token at the very end of a
            full chunk then goes unnoticed, and special tokens in the output are lost); "auto":
            ids if the server takes and returns them, else text.
        eos: end tokens, for a chunk that ends with one at its limit; default: the tokenizer's.
        sampling: default: `Sampling()`.
        samples: traces per problem.
        concurrency: maximum number of requests in flight.
        progress: show a progress bar on standard error.

    Returns:
        The traces and a report. The server's context length, if it tells, is checked before a trace
        begins.

    Raises:
        ValueError: bad input, a damaged log, or the log of another run; nothing was sent.
        EngineError: the server did not answer a first small request, or no trace fits its context.
        TraceError: some traces failed; the message says why. The others were completed, unless the
            server itself was lost.
    """
    method = Delethink() if method is None else method
    sampling = Sampling() if sampling is None else sampling
    _check(client, method, samples, concurrency)
    todo = prepare(problems, tokenizer)
    engine = Engine(client, model, sampling, tokenizer, tokens, eos)
    with Log(log) as book:
        begun = book.settings
        if begun is not None and tokens == "auto":
            engine.tokens, engine.reason = begun["tokens"], book.reason
        if engine.tokens == "text" and tokenizer is None:
            raise ValueError(
                f"kvcomp.delethink: tokenizer: expected one, as {log} was made with text, got None"
            )
        if begun is None:
            await engine.settle(todo[0].ids)
        settings = {
            "model": model,
            "tokens": engine.tokens,
            **{name: getattr(method, name) for name in ("chunk", "carry", "head", "variant")},
            **dataclasses.asdict(sampling),
        }
        settings = book.begin(settings, reason=engine.reason)
        keys = [_Key(p, s) for p in todo for s in range(samples)]
        loop = _Loop(engine, method, book, keys, settings)
        if begun is not None and loop.has_work():
            await engine.settle(todo[0].ids)
        loop.require_one_that_fits()
        return await loop.run(concurrency, progress)


def _check(client: Any, method: Any, samples: int, concurrency: int) -> None:
    if not isinstance(client, openai.AsyncOpenAI):
        raise TypeError(f"kvcomp.delethink: client: expected an openai.AsyncOpenAI, got {client!r}")
    fits, where = isinstance(method, Delethink), "kvcomp.delethink: method"
    require(fits, where, "a kvcomp.Delethink", method, TypeError)
    if method.inner is not None or method.reset != "prefill":
        raise ValueError(
            "kvcomp.delethink: method: expected inner=None and reset='prefill', as a server attends"
            f" densely and encodes the carry anew, got {method}"
        )
    if method.max_chunks is None:
        raise ValueError(
            "kvcomp.delethink: max_chunks: expected a number, without which a trace may never end,"
            " got None"
        )
    for name, value in (("samples", samples), ("concurrency", concurrency)):
        require(value >= 1, f"kvcomp.delethink: {name}", "at least 1", value)


class _Key(NamedTuple):
    problem: Problem
    sample: int


class _Loop:
    def __init__(
        self,
        engine: Engine,
        method: Delethink,
        book: Log,
        keys: list[_Key],
        settings: dict[str, Any],
    ) -> None:
        self.engine, self.method, self.book, self.keys = engine, method, book, keys
        self.hashes = {k.problem.id: fingerprint(settings, k.problem.ids) for k in keys}
        self.done = [self.finished(key) for key in keys]
        self.resumed = sum(map(len, self.done))
        self.lost = False  # the server, for everybody

    def finished(self, key: _Key) -> list[Record]:
        """The chunks of a trace that the log has, each what its request could have brought."""
        name = key.problem.id
        records = self.book.done(name, key.sample, self.hashes[name])[: self.method.max_chunks]
        for index, record in enumerate(records):
            chunk = self.method.chunk_at(index)
            assert chunk is not None, "the records are cut at max_chunks"
            used = len(self.context(key, chunk, records[:index])) + len(record.ids)
            wrong = record.context != used
            if self.engine.tokens == "ids":
                count, limit = len(record.ids), chunk.stop - chunk.start
                full = count == limit or (record.finish == "stop" and count < limit)
                wrong = wrong or not full or record.drift > 0
            if wrong:
                raise ValueError(
                    f"kvcomp.delethink: {self.book.path}: chunk {index} of {name!r}, sample"
                    f" {key.sample} is damaged: its ids, context or drift do not fit the schedule"
                )
        return records

    def require_one_that_fits(self) -> None:
        """A chunk too long for the server would fail every trace: say so before the first one."""
        waiting = [k for k, done in zip(self.keys, self.done, strict=True) if self.next_chunk(done)]
        if waiting:
            shortest = min(len(key.problem.ids) for key in waiting)
            try:
                self.engine.require_context(shortest, self.method.most_thought)
            except EngineError as error:
                raise EngineError(f"kvcomp.delethink: {error}", everyone=True) from None

    def next_chunk(self, done: list[Record]) -> Chunk | None:
        return None if done and done[-1].finish == "stop" else self.method.chunk_at(len(done))

    def has_work(self) -> bool:
        return any(self.next_chunk(done) for done in self.done)

    async def run(self, concurrency: int, progress: bool) -> Run:
        free = asyncio.Semaphore(concurrency)
        with progress_bar(len(self.keys), progress, "traces") as tell:
            work = zip(self.keys, self.done, strict=True)
            tasks = [asyncio.create_task(self.follow(*each, free, tell)) for each in work]
            try:
                ends = await asyncio.gather(*tasks)
            finally:
                for task in tasks:  # no request outlives the log
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        traces = [end for end in ends if isinstance(end, Trace)]
        run = Run(traces, self.engine.tokens, self.engine.reason, self.resumed)
        failures = {
            (key.problem.id, key.sample): end
            for key, end in zip(self.keys, ends, strict=True)
            if isinstance(end, EngineError)
        }
        if failures:
            raise TraceError(self.summary(failures, len(traces)), failures, run)
        return run

    def summary(self, failures: dict[tuple[str, int], EngineError], good: int) -> str:
        reasons: dict[str, list[str]] = {}
        for (name, sample), error in failures.items():
            reasons.setdefault(str(error), []).append(f"{name!r} sample {sample}")
        shown = "; ".join(
            f"{', '.join(who[:3])}{f' and {len(who) - 3} more' if len(who) > 3 else ''}: {why}"
            for why, who in list(reasons.items())[:5]
        )
        total = len(self.keys)
        waiting = total - good - len(failures)
        return (
            f"kvcomp.delethink: {len(failures)} of {total} traces failed, {good} were completed"
            f"{f', {waiting} were not continued' if waiting else ''}. {shown}. All finished chunks"
            f" are in {self.book.path}: repeat the run to resume from there"
        )

    async def follow(
        self, key: _Key, done: list[Record], free: asyncio.Semaphore, tell: Tell
    ) -> Trace | EngineError | None:
        """Complete one trace. Returns the trace, its error, or None if the server was lost."""
        tell(sum(len(record.ids) for record in done), False)
        async with free:
            while (chunk := self.next_chunk(done)) is not None:
                if self.lost:
                    return None
                try:
                    self.engine.require_context(len(key.problem.ids), self.method.most_thought)
                    record = await self.ask(key, chunk, done)
                except EngineError as error:
                    self.lost |= error.everyone
                    return error
                self.book.append(record)
                done.append(record)
                tell(len(record.ids), False)
        tell(0, True)
        return Trace(
            id=key.problem.id,
            sample=key.sample,
            prompt=key.problem.ids,
            output=[token for record in done for token in record.ids],
            finish="eos" if done[-1].finish == "stop" else "budget",
            chunks=len(done),
            longest_context=max(record.context for record in done),
            drift=sum(record.drift for record in done),
        )

    async def ask(self, key: _Key, chunk: Chunk, done: list[Record]) -> Record:
        context = self.context(key, chunk, done)
        limit = chunk.stop - chunk.start
        answer = await self.engine.complete(context, limit, self.seed(key, len(done)))
        return Record(
            id=key.problem.id,
            sample=key.sample,
            chunk=len(done),
            hash=self.hashes[key.problem.id],
            finish=answer.finish,
            context=len(context) + len(answer.ids),
            drift=answer.drift,
            ids=answer.ids,
        )

    def context(self, key: _Key, chunk: Chunk, done: list[Record]) -> list[int]:
        """Token ids of the prompt and of what `chunk` keeps of the output so far."""
        output = [token for record in done for token in record.ids]
        # By the schedule len(output) is chunk.start; after drift it is near it.
        carried = max(len(output) - (chunk.start - chunk.carried), 0)
        return key.problem.ids + output[: chunk.head] + output[carried:]

    def seed(self, key: _Key, chunk: int) -> int | None:
        seed = self.engine.sampling.seed
        if seed is None:
            return None
        text = f"{seed}/{key.problem.id}/{key.sample}/{chunk}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
