"""One decode step over an engine's block table: what each layer attends to.

Nothing here knows vLLM. An engine places the layers of a model once, opens a `Step` for every batch
of decode rows, and calls `decode` layer by layer, in order. Methods see a `PlacedLayer` as a layer
(`kvcomp.cache.view.Layer`), so the engine runs the same code as `kvcomp.patch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvcomp import Delta, ops
from kvcomp.cache.kv_cache import Notes
from kvcomp.cache.view import Layer, Read
from kvcomp.engines.vllm.settings import EngineMethod

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass
class Step:
    """A batch of decode rows in one group of layers.

    Attributes:
        table: [B, pages] int32, page ids in order; anything behind a row's last page.
        lens: [B] int32, tokens of each row, the newest included.
        longest: the largest of them, known on the host.
        page_size: tokens in a page.
        logits: [B, Hq, pages * page_size] fp32, for layers that select.
        kept: page ids [B, K] and lengths [B], where every layer attends to the same part of the
            table; None: to all of it.
        checked: the list that the last layer read; the next one need not look at its values again.
    """

    table: Tensor
    lens: Tensor
    longest: int
    page_size: int
    logits: Tensor | None = None
    kept: tuple[Tensor, Tensor] | None = None
    checked: Tensor | None = field(default=None, repr=False)
    _chosen: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def pages_of(self, columns: Tensor) -> Tensor:
        """Selected columns [B, 1, K] int32 as page ids [B, K] of this table; -1 stays.

        Those of this table's own selection are known; ranks that share a selection, and groups of
        layers with another table, look theirs up.
        """
        if self._chosen is None or self._chosen[0] is not columns:
            ids = self.table.gather(1, columns[:, 0].clamp(min=0).long())
            self._chosen = columns, ids.masked_fill_(columns[:, 0] < 0, -1)
        return self._chosen[1]

    def select(self, columns: Tensor, pages: Tensor) -> None:
        """Layers above read these columns [B, 1, K], which are these pages [B, K]."""
        self._chosen = columns, pages

    def reading(self, ids: Tensor) -> dict[str, Any]:
        """How the ops read a list of this step: its bound, and whether its values are known."""
        known, self.checked = ids is self.checked, ids
        return {
            "page_ids": ids,
            "page_size": self.page_size,
            "max_len": self.longest,
            "checked": known,
        }


class PlacedLayer:
    """One attention layer of an engine, as a method sees it (`kvcomp.cache.view.Layer`).

    Attributes:
        step, k, v: the batch being decoded, and the pools [pages, Hkv, P, D] that its table points
            into.
        out: [B, Hq, D], where its results go.
    """

    sinks: Tensor | None = None
    shared_sets = False  # the engine orders its memory
    step: Step
    k: Tensor
    v: Tensor
    out: Tensor

    def __init__(self, cache: PlacedModel, position: int) -> None:
        self.cache = cache
        self.position = position

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def seq_lens(self) -> Tensor:
        return self.step.lens

    @property
    def max_len(self) -> int:
        return self.step.longest

    @property
    def capacity(self) -> int:
        return self.step.table.shape[1] * self.step.page_size

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float, out: Tensor
    ) -> None:
        """q [B, Hq, D] over the pools k, v [pages, Hkv, P, D], into out [B, Hq, D]."""
        self.step, self.k, self.v, self.out = step, k, v, out
        if step.kept is not None:
            ids, lens = step.kept
            self._read(q, scale, lens, ids)
        elif isinstance(self.cache.method, Delta):
            self.cache.method.attend(self, q, scale)
        else:
            self.attend(q, scale)

    def attend(self, q: Tensor, scale: float, **read: Unpack[Read]) -> tuple[Tensor, Tensor]:
        """As `Layer.attend`; pages of the table are the only ones there are."""
        lens, logits = read.get("seq_lens", self.step.lens), read.get("logits")
        if "page_ids" not in read:
            return self._read(q, scale, lens, self.step.table, logits)
        assert read["page_size"] == self.step.page_size, "the engine cuts pages as the method does"
        return self._read(q, scale, lens, self.step.pages_of(read["page_ids"]), logits)

    def attend_and_select(self, q: Tensor, scale: float, **selection: Any) -> tuple[Tensor, ...]:
        """As `Layer.attend_and_select`, of pages of the table."""
        step = self.step
        page_size = selection.pop("page_size")
        assert page_size == step.page_size, "the engine cuts pages as the method does"
        pages = step.lens.new_empty(len(step.lens), 1, selection["num_pages"])
        selection.update(step.reading(step.table), scale=scale, out=self.out, pages=pages)
        found = ops.attend_and_select(q, self.k, self.v, step.lens, **selection)
        step.select(columns=found[3], pages=pages[:, 0])
        return found

    def _read(
        self, q: Tensor, scale: float, lens: Tensor, ids: Tensor, logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return ops.decode_attention(
            *(q, self.k, self.v, lens),
            **self.step.reading(ids),
            scale=scale,
            logits=logits,
            out=self.out,
        )


class PlacedModel:
    """The layers of a model that a method runs; a method sees it as `kvcomp.cache.view.Cache`.

    What a layer selects is a list of columns of the block table and not of page ids: layers may lie
    in groups with tables of their own.

    Attributes:
        method: with the group of ranks that hold the other heads, where there are any.
        layers: in model order.
        state: the method's notes on the current step.
        steps: always 0; the engine counts.
    """

    steps = 0

    def __init__(
        self,
        method: EngineMethod,
        num_layers: int,
        layer_class: type[PlacedLayer] = PlacedLayer,
    ) -> None:
        """Raises ValueError where the method does not fit a model of so many layers."""
        method.check(num_layers)
        self.method = method
        self.state = Notes()
        self.layers = [layer_class(self, position) for position in range(num_layers)]
        if isinstance(method, Delta):
            method.start(self)

    def logits_for(self, layer: Layer, q: Tensor) -> Tensor:
        logits = self.layers[layer.position].step.logits
        assert logits is not None, "a step longer than the budget has room for them"
        return logits
