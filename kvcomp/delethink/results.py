"""What comes out: traces, the run that they belong to, and the error of a run that must go on."""

from __future__ import annotations

from dataclasses import dataclass

from kvcomp.delethink.engine import EngineError


@dataclass(frozen=True)
class Trace:
    """The chain of thought of one sample of a problem.

    Attributes:
        prompt: its token ids.
        output: what was newly generated, all chunks in a row; the carry is in it once. The end
            token is the last one where the engine returns ids, and missing where it returns text.
        finish: "eos", or "budget" after `max_chunks`.
        chunks: how many it took.
        longest_context: tokens, prompt and carry and new ones, of the largest chunk.
        drift: tokens that text did not bring over exactly; 0 with ids.
    """

    id: str
    sample: int
    prompt: list[int]
    output: list[int]
    finish: str
    chunks: int
    longest_context: int
    drift: int


@dataclass(frozen=True)
class Run:
    """What `trace` returns; `str(run)` is a report.

    Attributes:
        traces: in the order of the problems, the samples of one problem in a row.
        tokens: "ids" or "text", what the engine takes and returns.
        reason: why it was text, where that was found out by trying.
        resumed: chunks that were in the log already.
    """

    traces: list[Trace]
    tokens: str
    reason: str | None = None
    resumed: int = 0

    def __str__(self) -> str:
        ends = [trace.finish for trace in self.traces]
        lines = [
            f"traces           {len(ends)}: {ends.count('eos')} ended by EOS,"
            f" {ends.count('budget')} by the budget",
            f"tokens           {sum(len(trace.output) for trace in self.traces):,}",
            f"chunks           {sum(trace.chunks for trace in self.traces):,},"
            f" {self.resumed:,} of them from the log",
            f"longest context  {max((t.longest_context for t in self.traces), default=0):,} tokens",
            f"token ids        {'exact' if self.tokens == 'ids' else 'by way of text'}"
            + (f" ({self.reason})" if self.reason else ""),
        ]
        if self.tokens == "text":
            lines.append(f"drift            {sum(t.drift for t in self.traces):,} tokens")
        return "\n".join(lines)


class TraceError(RuntimeError):
    """Some traces failed; finished chunks are in the log, and the same call goes on from there.

    Attributes:
        failures: (problem id, sample) -> what went wrong.
        run: the traces that came to their end.
    """

    def __init__(self, message: str, failures: dict[tuple[str, int], EngineError], run: Run):
        super().__init__(message)
        self.failures, self.run = failures, run
