"""The base of all retrieval methods: all K and V are in host memory, a part is on the device.

The device holds the first tokens (sinks), the newest ones (local) and the ones retrieved last. A
pool in host memory has all tokens. Tokens are retrieved in *units*. A method defines how the prompt
is cut into units, the digest of a unit, when to select again, and the score of a unit. Attention is
exact over the tokens on the device. No token is lost, and no token is attended to twice.

The output is cut into segments, which become units. A segment is written to the pool when it
closes, so it can leave the device at no cost. It leaves the local tokens only when a selection
follows at once, so every token can always be attended to.

A row may have fewer tokens than sinks, for example after the first piece of a prompt. All of them
are then on the device, and new tokens become sinks until there are enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp import ops
from kvcomp.cache.background import Background
from kvcomp.cache.host_pool import HostMemory
from kvcomp.cache.kv_cache import KVCache
from kvcomp.cache.layer import LayerCache
from kvcomp.cache.rows import Rows
from kvcomp.methods.audit import watch
from kvcomp.methods.resident import Resident

ALWAYS, NEVER = torch.inf, -torch.inf  # thresholds on a similarity


@dataclass(frozen=True)
class Retrieval(Resident):
    """Retrieves units by their scores; subclasses define `units` and `scores`."""

    croppable: ClassVar[bool] = False
    one_way: ClassVar[str] = "segments that are closed stay closed"
    in_step: ClassVar[bool] = True
    forks: ClassVar[bool] = False  # or the prompt would be in host memory twice

    # --- what subclasses say ----------------------------------------------------------------------

    def unit_count(self, tokens: int) -> int:
        """The number of units that `units` makes of `tokens` columns."""
        raise NotImplementedError

    def units(self, keys: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the tokens [first, last) of a prompt into units.

        Args:
            keys: [B, Hkv, n, D].
            first, last: [B] int32.

        Returns:
            labels [B, Hkv, n] int32, unit of each token; digests [B, Hkv, U, W] and sizes
            [B, Hkv, U] int32, U = unit_count(n).
        """
        raise NotImplementedError

    def scores(self, layer: LayerCache, q: Tensor, scale: float, active: Tensor) -> Tensor:
        """Scores [B, Hkv, U] fp32 of all units for q [B, Hq, D], in rows where active [B] is 1."""
        index = layer.hosted.index
        return ops.unit_scores(
            q, index.digests, index.starts, index.num_indexed, active, scale=scale
        )

    def similarity(self, layer: LayerCache, q: Tensor) -> Tensor:
        """[B] fp32, decides when segments end and rows select; -inf in the first step."""
        return ops.query_similarity(q, layer.state["query"])

    @property
    def cut_below(self) -> float:
        """The similarity below which a segment ends, if it is long enough."""
        return NEVER

    @property
    def retrieve_below(self) -> float:
        """The similarity below which a row selects again."""
        return ALWAYS

    # --- the hooks --------------------------------------------------------------------------------

    def start(self, cache: KVCache) -> None:
        cache.state.memory = HostMemory(self.host_limit)
        cache.state.background = None
        cache.state.lacks_sinks = True  # whether rows may have fewer tokens than sinks
        cache.state.prompt_columns = 0

    def prefill(self, layer: LayerCache, q: Tensor) -> None:
        """New tokens become units in host memory; sinks and the newest stay on the device."""
        if layer.position < self.dense_layers:
            return
        if not layer.is_hosted:
            self._begin(layer, q)
            first_row = torch.full_like(layer.seq_lens, self.sinks)
        else:
            first_row = self._close_open(layer).clamp(min=self.sinks)
        first = layer.seq_lens - (layer.logical_lens - first_row).clamp(min=0)
        last = torch.maximum(layer.seq_lens - self.num_newest, first)  # slots [first, last) leave
        layer.positions(layer.kv_heads)
        layer.hosted.absorb(layer, self, first_row, first, last)
        slot = torch.arange(self.num_newest, device=last.device)
        newest = (last[:, None] + slot).clamp(max=layer.max_len - 1)
        sinks = torch.arange(self.sinks, device=last.device).clamp(max=layer.max_len - 1)
        sinks = sinks.expand(len(last), -1)
        lens = torch.minimum(self.sinks + layer.seq_lens - last, layer.seq_lens)
        layer.keep(torch.cat([sinks, newest], 1), lens)
        layer.state["query"].zero_()  # so that the first step retrieves
        if not layer.cache.steps:
            layer.state["first_units"] = layer.hosted.index.num_units.clone()
            layer.cache.state.prompt_columns = layer.columns
        layer.state.pop("recall", None)  # of `audit`, before this prompt

    def context(self, layer: LayerCache) -> tuple[Rows, Tensor]:
        if not layer.is_hosted:
            return super().context(layer)
        lens = self._close_open(layer).tolist()
        ends, new = (
            layer.seq_lens.tolist(),
            (layer.logical_lens.cpu() - torch.tensor(lens)).tolist(),
        )
        rows = []
        for row, (length, end, count) in enumerate(zip(lens, ends, new, strict=True)):
            fresh = layer.stored().row(row).part(slice(end - count, end)).parts
            pooled = layer.hosted.pool.read(row, 0, length).parts
            rows.append([torch.cat(parts, 1) for parts in zip(pooled, fresh, strict=True)])
        return Rows(*(_stacked(part) for part in zip(*rows, strict=True))), layer.logical_lens

    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        self._prepare(layer, q, scale, audit=self.audit)
        out = layer.attend(q, scale)[0]
        self.look_ahead(layer, q, scale)
        return out

    def look_ahead(self, layer: LayerCache, q: Tensor, scale: float) -> None:
        """A step has attended: what may be done for the next one."""

    def verify(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        """A draft whose query turns selects before it attends. So the drafts are tried one by one,
        on what is put back afterwards, and those accepted select once more."""
        if not layer.is_hosted:
            return super().verify(layer, q, scale)
        layer.drafts["queries"] = q.detach().transpose(1, 2)
        state, outs = layer.cache.state, []
        lacked_sinks = state.lacks_sinks
        with layer.trying(), layer.cache.meter.trying(layer.position):
            for index in range(layer.staged):
                layer.accept(index, None)
                self._prepare(layer, q[:, :, index], scale)
                outs.append(layer.attend(q[:, :, index], scale)[0])
                self.look_ahead(layer, q[:, :, index], scale)
        state.lacks_sinks = lacked_sinks
        return torch.stack(outs, 1)

    def accept(self, layer: LayerCache, index: int) -> None:
        if layer.is_hosted:
            q = layer.drafts["queries"][:, index]
            self._prepare(layer, q, layer.scale, audit=self.audit)
            self.look_ahead(layer, q, layer.scale)

    def _prepare(self, layer: LayerCache, q: Tensor, scale: float, *, audit: bool = False) -> None:
        """Have on the device what a step is to attend to."""
        if not layer.is_hosted:
            return
        layer.settle()
        if layer.cache.state.lacks_sinks:
            self._store_sinks(layer)
        triggered = self._retrieve(layer, q, scale)
        if audit:
            watch(layer, q, scale, self.budget, self.sinks, triggered)

    def rewind(self, cache: KVCache, columns: int) -> int:
        """Goes back no further than to the first prompt, which stays in the pool as clustered."""
        prompt = cache.state.prompt_columns
        if columns < prompt:
            return super().rewind(cache, columns)
        cache.state.lacks_sinks = True
        for layer in cache.layers:
            if not layer.is_hosted:
                layer.crop(layer.columns - prompt)
                continue
            layer.hosted.recede(layer, prompt, layer.state["first_units"])
            layer.state["query"].zero_()  # so that the next step selects
            layer.state.pop("recall", None)
        return prompt

    # --- how --------------------------------------------------------------------------------------

    def _begin(self, layer: LayerCache, q: Tensor) -> None:
        """Set up the pool. The first prompt is in `layer`, and the pool is empty."""
        state = layer.cache.state
        if state.background is None:
            state.background = Background(q.device)
        width = self.digest(q[:1, :1, :1]).shape[-1]
        layer.host(state.memory, state.background, width, self.sinks)
        layer.state["query"] = q.new_zeros(q.shape[0], q.shape[1], q.shape[3])
        layer.limit(self.most_resident - 1, 1)

    def _close_open(self, layer: LayerCache) -> Tensor:
        """Make the open segment, without the tokens just added, a unit. Returns its end [B]."""
        layer.settle()
        past, first_open = layer.logical_lens - layer.added, layer.hosted.index.first_open()
        tokens = (past - first_open).clamp(min=0)
        if bool(tokens.any()):
            layer.hosted.index.reserve(1)
            layer.hosted.reserve(layer)
            layer.hosted.index.close(first_open + tokens)
            self.store(layer, tokens)
        return past

    def _store_sinks(self, layer: LayerCache) -> None:
        """In rows with fewer tokens than sinks, write the newest token to the pool. It belongs to
        no segment, so no other code writes it."""
        layer.hosted.reserve(layer)
        lens = layer.logical_lens.tolist()
        for row, last in enumerate(lens):
            if 0 < last <= self.sinks:
                newest = layer.stored().row(row).part(slice(last - 1, last))
                layer.hosted.pool.write(row, last - 1, newest)
        if layer.position == len(layer.cache.layers) - 1:
            layer.cache.state.lacks_sinks = min(lens) < self.sinks

    def _retrieve(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        """Close segments that end here and select in rows where that is due; these are 1 in [B]."""
        index, (shortest, longest) = layer.hosted.index, self.segment
        index.reserve(1)
        layer.hosted.reserve(layer)  # refused memory must not find a segment half closed
        closed, triggered = ops.segment_boundaries(
            self.similarity(layer, q),
            layer.logical_lens.clamp(min=self.sinks),  # sinks belong to no segment
            index.starts,
            index.num_units,
            index.num_indexed,
            cut_below=self.cut_below,
            retrieve_below=self.retrieve_below,
            shortest=shortest,
            longest=longest,
            local=self.local,
        )
        if _some(closed):
            self.store(layer, closed)
            layer.cache.meter.cut(closed, longest)
        if _some(triggered):
            self.select(layer, q, scale, triggered)
        return triggered

    def store(self, layer: LayerCache, closed: Tensor) -> None:
        """Write the newest unit, of closed [B] tokens (0: none), to the pool and the index."""
        layer.hosted.store(layer, closed, layer.hosted.index.digests)

    def select(self, layer: LayerCache, q: Tensor, scale: float, active: Tensor) -> None:
        """Bring the units selected by q to the device, in rows where active [B] is 1."""
        index = layer.hosted.index
        scores = self.scores(layer, q, scale, active)
        rows = ops.select_units(scores, index.starts, index.num_indexed, active, self.budget)
        first_local = index.first_local()
        # One less than the maximum: the newest token is in, and surplus local tokens have left.
        most = self.most_resident - 1
        fetched = layer.hosted.exchange(layer, rows, first_local, active, most)
        wanted = (first_local - self.sinks).clamp(max=self.budget)  # all belong to units
        layer.cache.meter.retrieved(layer, active, wanted, fetched)


def _some(counts: Tensor) -> bool:
    """Whether any count is not 0. True on a GPU, because asking would stall; the ops then check."""
    return counts.is_cuda or any(counts.tolist())


def _stacked(pieces: tuple[Tensor, ...]) -> Tensor:
    """[H, n_b, ...] of each row -> [B, H, n, ...], zeros behind."""
    like, longest = pieces[0], max(piece.shape[1] for piece in pieces)
    out = like.new_zeros(len(pieces), like.shape[0], longest, *like.shape[2:])
    for row, piece in zip(out, pieces, strict=True):
        row[:, : piece.shape[1]] = piece
    return out
