"""Results: traces, the run they belong to, and the error of a run that has to be repeated."""

from __future__ import annotations

from dataclasses import dataclass

from kvcomp.delethink.engine import EngineError


@dataclass(frozen=True)
class Trace:
    """The chain of thought for one sample of a problem.

    Attributes:
        prompt: token ids of the prompt.
        output: token ids of the output, all chunks in a row; carried tokens are in it once. It
            includes the end token if the server returns ids, but not if it returns text.
        finish: "eos", or "budget" after `max_chunks`.
        chunks: number of chunks.
        longest_context: tokens in the largest context: prompt, carry and new tokens.
        drift: tokens that text did not carry over exactly; 0 with ids.
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
    """The result of `trace`; `str(run)` is a report.

    Attributes:
        traces: in the order of the problems, all samples of one problem in a row.
        tokens: "ids" or "text", whichever was exchanged with the server.
        reason: why "auto" chose text; None if it did not.
        resumed: chunks that the log already had.
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
            f" {self.resumed:,} from the log",
            f"longest context  {max((t.longest_context for t in self.traces), default=0):,} tokens",
            f"token ids        {'exact' if self.tokens == 'ids' else 'through text'}"
            + (f" ({self.reason})" if self.reason else ""),
        ]
        if self.tokens == "text":
            lines.append(f"drift            {sum(t.drift for t in self.traces):,} tokens")
        return "\n".join(lines)


class TraceError(RuntimeError):
    """Some traces failed. The log has all finished chunks; the same call resumes from there.

    Attributes:
        failures: (problem id, sample) -> its error.
        run: the completed traces.
    """

    def __init__(self, message: str, failures: dict[tuple[str, int], EngineError], run: Run):
        super().__init__(message)
        self.failures, self.run = failures, run
