"""Report: the tokens and bytes that a run decoded, attended to, kept and read, all counted."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from kvcomp.cache.meter import Meter

if TYPE_CHECKING:
    from kvcomp.cache.kv_cache import Policy


@dataclass
class Report:
    """The numbers of one run, over all its sequences and the layers that the method manages.

    Attributes:
        method: name and parameters of the method.
        tokens_decoded: tokens of decode steps in all rows, including those after a row's end. A
            row's first token comes from the prefill.
        verifications: forwards over drafts of further tokens.
        tokens_drafted, tokens_accepted: these drafts, and the drafts that were accepted, over all
            rows; an accepted draft counts as decoded.
        decode_seconds: wall time from the end of each prefill to the last decode step after it.
        tokens_attended: tokens that a layer attended to per query of a decoded token or a draft, on
            average.
        tokens_attended_dense: the same with dense attention.
        why_dense: why a method that attends to a budget left nothing out; None if it did.
        kv_bytes_kept, kv_bytes_dense: bytes of K and V held now, and by a cache that keeps all.
        kv_bytes_peak: most bytes of K and V slots in use at once (rows times the longest row).
        tracking_bytes_peak: most bytes of notes that the method kept besides K and V.
        kv_bytes_allocated: bytes of the slabs now, including spare capacity.
        logits_bytes_allocated: the buffer for the logits of a step, shared by all layers; 0 if the
            method does not use logits.
        kv_bytes_read: bytes of K and V that all decode steps read; drafts that share a read count
            once.
        kept_mean, kept_peak: tokens in the longest row of a layer, over decode steps.
        evictions: how often tokens were evicted from a layer.
        tokens_evicted: tokens evicted, over all rows and layers.
        kv_bytes_freed: bytes of K and V of the evicted tokens.
        retrievals: selections made, over all rows and layers; retrieval_rate: selections per row,
            step and retrieving layer.
        missing_share: the share of selected tokens that had to be fetched over the link.
        link_bytes_fetched, link_bytes_stored: bytes of K and V copied from and to host memory.
        host_bytes_peak: most bytes of host memory for K and V of one cache.
        segment_lengths: number of closed segments of the output by length.
        recall_before, recall_after: with `audit=True`, the covered share of the attention of the
            best tokens within the budget, in the step before a retrieval and in that step.
        boundaries: how often decoding continued with a new context; boundary_seconds: total time
            that it paused there, boundary_median: median pause.
        tokens_reencoded: tokens encoded again at boundaries, over all rows.
        linear_rows_layers: linear layers of the model that go through the op `linear_rows` where
            they have at most 32 rows of input; other_linear_layers: those left to torch;
            norm_rows_layers: RMS norms that go through the op `norm_rows`; rotate_rows_layers:
            attention layers that rotate through the op `rotate_rows`. All are 0 with
            `patch(linear_rows=False)`.
        layers: per managed layer: position, tokens_attended, kept and evicted tokens, bytes read
            and fetched, retrieval rate.
    """

    method: str
    tokens_decoded: int = 0
    verifications: int = 0
    tokens_drafted: int = 0
    tokens_accepted: int = 0
    decode_seconds: float = 0.0
    tokens_attended: float = 0.0
    tokens_attended_dense: float = 0.0
    why_dense: str | None = None
    kv_bytes_kept: int = 0
    kv_bytes_dense: int = 0
    kv_bytes_peak: int = 0
    kv_bytes_allocated: int = 0
    logits_bytes_allocated: int = 0
    kv_bytes_read: int = 0
    tracking_bytes_peak: int = 0
    kept_mean: float = 0.0
    kept_peak: int = 0
    evictions: int = 0
    tokens_evicted: int = 0
    kv_bytes_freed: int = 0
    retrievals: int = 0
    retrieval_rate: float = 0.0
    missing_share: float = 0.0
    link_bytes_fetched: int = 0
    link_bytes_stored: int = 0
    host_bytes_peak: int = 0
    segment_lengths: dict[int, int] = field(default_factory=dict)
    recall_before: float | None = None
    recall_after: float | None = None
    boundaries: int = 0
    boundary_seconds: float = 0.0
    boundary_median: float = 0.0
    tokens_reencoded: int = 0
    linear_rows_layers: int = 0
    other_linear_layers: int = 0
    norm_rows_layers: int = 0
    rotate_rows_layers: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, method: Policy, meter: Meter, seconds: float, layers: bool) -> Report:
        """Read a meter; this waits for the device."""
        read = [int(tokens) for tokens in meter.read_tokens]
        attended = [int(tokens) for tokens in meter.attended_tokens]
        kept, seen = meter.kept_tokens, meter.seen_tokens
        decoded = max(meter.tokens_decoded, 1)
        evicted = [int(tokens) for tokens in meter.evicted_tokens]
        retrievals = [int(count) for count in meter.retrievals]
        retrieving = [count for count in retrievals if count]
        fetched = [int(n) * b for n, b in zip(meter.fetched_rows, meter.row_bytes, strict=True)]
        stored = [int(n) * b for n, b in zip(meter.stored_rows, meter.row_bytes, strict=True)]
        before, after = (meter.recalls / max(meter.audits, 1)).tolist()
        rows = zip(read, meter.slot_bytes, kept, evicted, retrievals, fetched, strict=False)
        report = cls(
            method=str(method),
            tokens_decoded=meter.tokens_decoded,
            verifications=meter.verifications,
            tokens_drafted=meter.drafted_tokens,
            tokens_accepted=meter.accepted_tokens,
            decode_seconds=seconds,
            tokens_attended=sum(attended) / len(attended) / max(meter.queries, 1),
            tokens_attended_dense=int(meter.dense_tokens) / decoded,
            kv_bytes_kept=sum(n * b for n, b in zip(kept, meter.slot_bytes, strict=False)),
            kv_bytes_dense=sum(n * b for n, b in zip(seen, meter.token_bytes, strict=False)),
            kv_bytes_peak=meter.peak_bytes,
            kv_bytes_allocated=meter.allocated_bytes,
            logits_bytes_allocated=meter.logits_bytes,
            kv_bytes_read=sum(n * b for n, b in zip(read, meter.slot_bytes, strict=True)),
            tracking_bytes_peak=meter.peak_note_bytes,
            kept_mean=meter.sum_len / max(meter.steps * len(read), 1),
            kept_peak=meter.peak_len,
            evictions=int(meter.evictions),
            tokens_evicted=sum(evicted),
            kv_bytes_freed=sum(n * b for n, b in zip(evicted, meter.slot_bytes, strict=True)),
            retrievals=sum(retrievals),
            retrieval_rate=sum(retrieving) / (decoded * max(len(retrieving), 1)),
            missing_share=sum(int(n) for n in meter.fetched_rows)
            / max(sum(int(n) for n in meter.wanted_rows), 1),
            link_bytes_fetched=sum(fetched),
            link_bytes_stored=sum(stored),
            host_bytes_peak=meter.peak_host_bytes,
            segment_lengths={n: count for n, count in enumerate(meter.segments.tolist()) if count},
            recall_before=before if meter.audits else None,
            recall_after=after if meter.audits else None,
            boundaries=len(meter.boundary_seconds),
            boundary_seconds=sum(meter.boundary_seconds),
            boundary_median=median(meter.boundary_seconds or [0.0]),
            tokens_reencoded=meter.reencoded_tokens,
            layers=[
                {
                    "position": position,
                    "tokens_attended": each / max(meter.queries, 1),
                    "kv_bytes_read": tokens * size,
                    "kept_tokens": tokens_kept,
                    "evicted_tokens": tokens_evicted,
                    "retrieval_rate": times / decoded,
                    "link_bytes_fetched": link,
                }
                for position, (
                    (tokens, size, tokens_kept, tokens_evicted, times, link),
                    each,
                ) in enumerate(zip(rows, attended, strict=True))
            ]
            if layers
            else [],
        )
        if report.tokens_decoded and report.attended_ratio > 1 - 1e-9:
            report.why_dense = _why_dense(method.attention.dense_up_to, report.kept_peak)
        return report

    @property
    def attended_ratio(self) -> float:
        """Attended tokens divided by those of dense attention; 1.0 before the first step."""
        dense = self.tokens_attended_dense
        return self.tokens_attended / dense if dense else 1.0

    @property
    def kv_bytes_read_per_token(self) -> float:
        return self.kv_bytes_read / self.tokens_decoded if self.tokens_decoded else 0.0

    @property
    def link_bytes_per_token(self) -> float:
        """Bytes fetched and stored, including the prompt's, per decoded token."""
        both = self.link_bytes_fetched + self.link_bytes_stored
        return both / self.tokens_decoded if self.tokens_decoded else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_decoded / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All numbers, including derived ones, ready for JSON."""
        return asdict(self) | {
            "attended_ratio": self.attended_ratio,
            "link_bytes_per_token": self.link_bytes_per_token,
            "kv_bytes_read_per_token": self.kv_bytes_read_per_token,
            "tokens_per_second": self.tokens_per_second,
        }

    def __str__(self) -> str:
        evicted = (
            f"  evicted   {self.tokens_evicted} tokens in {self.evictions} evictions,"
            f" {mebibytes(self.kv_bytes_freed)} freed; kept {self.kept_mean:.0f} tokens a layer"
            f" (peak {self.kept_peak})"
        )
        segments = sum(n * count for n, count in self.segment_lengths.items())
        mean = segments / max(sum(self.segment_lengths.values()), 1)
        retrieved = (
            f"  retrieved in {self.retrieval_rate:.1%} of the steps, {self.missing_share:.0%} of a"
            f" selection over the link; segments of {mean:.1f} tokens\n"
            f"  link      {mebibytes(self.link_bytes_fetched)} fetched,"
            f" {mebibytes(self.link_bytes_stored)} stored,"
            f" {mebibytes(self.link_bytes_per_token)} per token;"
            f" host memory {mebibytes(self.host_bytes_peak)}"
        )
        if self.recall_after is not None:
            retrieved += (
                f"\n  recall    {self.recall_after:.1%} of the best set's attention in the step of"
                f" a retrieval, {self.recall_before:.1%} in the step before"
            )
        chunked = (
            f"  chunks    {self.boundaries} boundaries of {self.boundary_median * 1e3:.1f} ms,"
            f" {self.tokens_reencoded} tokens encoded anew; contexts of at most {self.kept_peak}"
        )
        linear = (
            f"  linear    {self.linear_rows_layers} layers go through linear_rows,"
            f" {self.other_linear_layers} keep their own way;"
            f" {self.norm_rows_layers} norms through norm_rows,"
            f" {self.rotate_rows_layers} rotations through rotate_rows"
        )
        checked = (
            f"  drafts    {self.tokens_accepted} of {self.tokens_drafted} accepted, in"
            f" {self.verifications} forwards over several tokens"
        )
        return "\n".join(
            [
                self.method,
                f"  decoded   {self.tokens_decoded} tokens in {self.decode_seconds:.2f} s,"
                f" {self.tokens_per_second:.1f} tokens/s",
                f"  attended  {self.tokens_attended:.0f} tokens per step and layer,"
                f" {self.attended_ratio:.0%} of dense ({self.tokens_attended_dense:.0f})"
                + (f": {self.why_dense}" if self.why_dense else ""),
                f"  KV kept   {mebibytes(self.kv_bytes_kept)} of"
                f" {mebibytes(self.kv_bytes_dense)} dense,"
                f" peak {mebibytes(self.kv_bytes_peak)},"
                f" allocated {mebibytes(self.kv_bytes_allocated)}",
                f"  KV read   {mebibytes(self.kv_bytes_read_per_token)} per token",
                *([checked] if self.verifications else []),
                *([linear] if self.linear_rows_layers else []),
                *([evicted] if self.evictions else []),
                *([retrieved] if self.retrievals else []),
                *([chunked] if self.boundaries else []),
            ]
        )


def _why_dense(budget: float, longest: int) -> str | None:
    if math.isinf(budget):  # of this method attention alone does not tell
        return None
    if longest <= budget:
        return f"no context was longer than the {budget:.0f} tokens of the budget"
    return "all layers are dense with these settings"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"
