"""The static flavour of the cache: memory of a fixed size, lengths that only tensors know.

A decode step then does the same work on the same addresses whatever the lengths, so one compiled
graph, or one CUDA graph, holds it. What the host must know it counts beside the steps (`seen`), and
what steps read they count on the device (`StaticMeter`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.cache.kv_cache import KVCache, Policy
from kvcomp.cache.layer import LayerCache
from kvcomp.cache.meter import Meter


class StaticLayerCache(LayerCache):
    """K and V of one layer: [B, Hkv, max_tokens, D] each, for methods that let nothing leave.

    `max_len` is `max_tokens` from the start, and `logical_lens` is `seq_lens`. `reset` keeps the
    memory for sequences of the same shape, so that addresses outlive a batch.
    """

    cache: StaticKVCache

    def __init__(self, cache: StaticKVCache, position: int) -> None:
        self._slab: tuple[Tensor, ...] | None = None  # k, v and seq_lens, also between sequences
        super().__init__(cache, position)

    def reset(self) -> None:
        super().reset()
        self.max_len = self.cache.max_tokens
        self._uniform = False  # as far as the host knows

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None:
        """Add n tokens to every row, as `LayerCache.append`; the caller has checked the room."""
        self._check(k, v, valid)
        self.first = self.seq_lens is None
        if self.first:
            self._open(k)
        self.added = self._scatter(k.detach(), v.detach(), valid)
        self.seq_lens.add_(self.added)
        if self.position == 0:
            self.cache.columns.add_(k.shape[2])

    def select(self, rows: Tensor) -> None:
        """Rows become `rows` ([B'] int64 indices), in place where their number stays the same."""
        if self.seq_lens is None:
            return
        rows = rows.to(self._k.device)
        if len(rows) == len(self.seq_lens):
            for tensor in self._slab:
                tensor.copy_(tensor[rows])
        else:
            self._bind(tuple(tensor[rows] for tensor in self._slab))
        self.state = {name: tensor[rows] for name, tensor in self.state.items()}

    def shows(self, mask: Tensor) -> bool:
        """By the number of tokens of each row: where they stood, a static cache does not keep."""
        return torch.equal(mask.sum(1).int(), self.seq_lens.to(mask.device))

    def _open(self, k: Tensor) -> None:
        """The first tokens of new sequences come in: memory of the last ones, if it fits."""
        shape = torch.Size((*k.shape[:2], self.max_len, k.shape[3]))
        have = self._slab and (self._slab[0].shape, self._slab[0].dtype, self._slab[0].device)
        if have != (shape, k.dtype, k.device):
            self._slab = None  # before there is more
            # Zeros, because a mask does not stop the NaN that memory never written may hold.
            lens = torch.zeros(k.shape[0], dtype=torch.int32, device=k.device)
            self._slab = k.new_zeros(shape), k.new_zeros(shape), lens
        self._bind(self._slab)
        self.seq_lens.zero_()
        self.token_bytes = self.slot_bytes = 2 * k.shape[1] * k.shape[3] * k.element_size()
        if self.position == 0:
            self.cache.open(k.device)

    def _bind(self, slab: tuple[Tensor, ...]) -> None:
        self._slab = slab
        self._k, self._v, self.seq_lens = slab
        self.logical_lens = self.seq_lens
        for tensor in slab:
            torch._dynamo.mark_static_address(tensor, guard=False)


class StaticKVCache(KVCache):
    """The layers of one batch, with room for `max_tokens` columns (padding included).

    Attributes:
        max_tokens: columns that there may be, and capacity of each row.
        columns: [] int64, columns seen, on the device.
        seen: the same on the host: exact after a prompt, and at least that many later. Steps that
            run without the host, such as those of a graph that is replayed, are not in it.
    """

    layer_class = StaticLayerCache
    meter: StaticMeter

    def __init__(
        self, method: Policy, num_layers: int, meter: StaticMeter, max_tokens: int
    ) -> None:
        self.max_tokens = max_tokens
        self.columns = torch.zeros((), dtype=torch.int64)
        super().__init__(method, num_layers, meter)

    def reset(self) -> None:
        """Forget the sequences, and keep the memory."""
        self.meter.settle()  # what they had in use in the end
        super().reset()
        self.columns.zero_()
        self.seen = 0

    def open(self, device: torch.device) -> None:
        """New sequences are on `device`, where their columns and reads are counted from now on."""
        self.columns = self.columns.to(device)
        torch._dynamo.mark_static_address(self.columns, guard=False)
        self.meter.count_on(device)

    def enter(self, count: int) -> None:
        """Another `count` columns are about to come.

        Raises:
            ValueError: there is no room for them; nothing has changed.
        """
        if count > 1:  # once per prompt
            self.seen = int(self.columns)
        if self.seen + count > self.max_tokens:
            raise ValueError(
                f"kvcomp: {self.seen} tokens are in the cache and {count} more would come, but"
                f" patch(max_tokens={self.max_tokens}) made room for no more"
            )
        self.seen += count

    def logits_for(self, layer: LayerCache, q: Tensor) -> Tensor:
        """Room for the logits of a decode step, [B, Hq, max_tokens] fp32, out of the graph's own
        memory."""
        return q.new_empty(*q.shape[:2], layer.capacity, dtype=torch.float32)

    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        out = self.method.attend(layer, q, scale)
        if layer.position == len(self.layers) - 1:
            self.meter.stepped(self)
            self.method.end_step(self)
        return out

    def crop(self, count: int) -> None:
        raise ValueError("kvcomp: crop: a static cache takes no tokens back")


class StaticMeter(Meter):
    """A Meter whose steps count on the device; `settle` brings the figures home.

    Attributes:
        counts: [4 + layers] int64: steps, longest row summed over steps, rows decoded, tokens
            that a layer with all would have read, and tokens read by each layer.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.counts = torch.zeros(4 + num_layers, dtype=torch.int64)
        self._reads: list[Tensor | None] = [None] * num_layers  # [B] each, of the running step

    def count_on(self, device: torch.device) -> None:
        """Count there; the address stays the same as long as the device does."""
        if self.counts.device != device:
            self.counts = self.counts.to(device)
        torch._dynamo.mark_static_address(self.counts, guard=False)

    def attended(self, position: int, lens: Tensor) -> None:
        self._reads[position] = lens

    def stepped(self, cache: KVCache) -> None:
        """One small reduction for the whole step."""
        seen = cache.layers[0].seq_lens
        one = torch.ones_like(seen)
        rows = torch.stack([one, seen, *self._reads]).sum(1)  # int64
        self.counts.add_(torch.cat([one[:1].long(), seen.max()[None].long(), rows]))
        self._reads[:] = [None] * len(self._reads)

    def observe(self, cache: KVCache) -> None:
        """New tokens are in `cache`, and what another one held is settled."""
        self.settle()
        self.token_bytes = [layer.token_bytes for layer in cache.layers]
        self.slot_bytes = [layer.slot_bytes for layer in cache.layers]
        self._lens = [(x.seq_lens, x.logical_lens, 0) for x in cache.layers]
        slots = len(cache.layers[0].seq_lens) * cache.layers[0].capacity
        self.allocated_bytes = slots * sum(self.slot_bytes)
        self.settle()

    def settle(self) -> None:
        """Bring the figures up to date; this waits for the device."""
        steps, longest, rows, dense, *reads = self.counts.tolist()
        self.counts.zero_()
        self.steps += steps
        self.sum_len += longest * len(reads)
        self.tokens_decoded += rows
        self.dense_tokens += dense
        self.read_tokens = [a + b for a, b in zip(self.read_tokens, reads, strict=True)]
        if self._lens:
            lens = self._lens[0][0]
            self.peak_len = max(self.peak_len, int(lens.max()))
            used = int(lens.max()) * len(lens) * sum(self.slot_bytes)
            self.peak_bytes = max(self.peak_bytes, used)
