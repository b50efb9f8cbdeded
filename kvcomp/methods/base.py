"""Method: the hooks that decide what a decode step attends to and what the cache keeps.

A method is a dataclass whose fields are the paper's hyper-parameters, in tokens or pages. It
overrides only the hooks it needs. Its notes about a batch are kept in the cache (`cache.state`,
`layer.state`), so one method object serves any number of caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import Field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from kvcomp.cache.kv_cache import KVCache
from kvcomp.cache.layer import LayerCache
from kvcomp.cache.rows import Rows
from kvcomp.checks import require, require_one_of
from kvcomp.methods.cost import Place, StepBytes
from kvcomp.methods.fields import check_types

if TYPE_CHECKING:
    from typing_extensions import Self

METHODS: dict[str, type[Method]] = {}


class Method:
    """Dense attention over all tokens. Subclasses override the hooks in which they differ.

    Class attributes:
        name: name of the method on the command line and in tables.
        baseline: True for methods that exist for comparison.
        croppable: whether the last tokens can be taken back exactly.
        one_way: the reason if they cannot.
        in_step: whether all rows must accept the same number of drafts, because the method counts
            steps for all rows together.
        forks: whether the same sequences may be in two caches at once.
        static: whether a decode step, except for `between_steps`, does the same work at all lengths
            and decides on the device alone; in a static cache `layer.max_len` is the capacity.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # subclasses are dataclasses

    name: ClassVar[str]
    baseline: ClassVar[bool] = False
    croppable: ClassVar[bool] = True
    one_way: ClassVar[str] = "it does not keep all that they have changed"
    in_step: ClassVar[bool] = False
    forks: ClassVar[bool] = True
    static: ClassVar[bool] = False

    def __init_subclass__(
        cls, *, name: str | None = None, baseline: bool = False, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:  # tools that observe a run are methods too, but not in the tables
            cls.name, cls.baseline = name, baseline
            METHODS[name] = cls

    def __post_init__(self) -> None:
        """Check the types of the fields. Subclasses add checks of the values.

        Raises:
            TypeError: the type of a field differs from its annotation.
        """
        check_types(self)

    def _require(self, condition: bool, field: str, expected: str) -> None:
        """Raise ValueError, with the value of the field, unless `condition` holds."""
        require(condition, f"kvcomp.{type(self).__name__}: {field}", expected, getattr(self, field))

    def _require_one_of(self, known: Iterable[str], field: str) -> None:
        require_one_of(known, f"kvcomp.{type(self).__name__}: {field}", getattr(self, field))

    @classmethod
    def example(cls, budget: int | None = None) -> Self:
        """An instance for short contexts (tests, the demo) with `budget` tokens, if it has one.

        Raises:
            ValueError: a budget that the method cannot use.
        """
        return cls()

    @classmethod
    def for_model(cls, model: str, **fields: Any) -> Self:
        """An instance with the settings published for a model, if there are any.

        Args:
            model: hub name or path.
            fields: fields of the dataclass; they override published settings.
        """
        return cls(**fields)

    @classmethod
    def calibrate(cls, model: Any, prompts: list, **options: Any) -> Self:
        """An instance with the model-dependent fields measured on your own prompts. What follows
        them is decoded with dense attention, or given (`answers=`). Do not use your test's prompts.

            Delta.calibrate(model, prompts, answers=answers, num_delta=3, every=64)
            LazyEviction.calibrate(model, prompts, max_new_tokens=1024, alphas=(1e-4, 1e-3))
            LouisKV.calibrate(model, prompts, rate=0.1, max_new_tokens=1024)

        Args:
            model: a Hugging Face causal LM.
            prompts: texts (with `tokenizer=`) or lists of token ids.
            options: as above, explained in `kvcomp.hf.calibrate`; all others are fields of the
                result.

        Raises:
            TypeError: the method has nothing to measure.
            ValueError: the answers are too short to measure anything.
        """
        return Method._calibrate(cls, model, prompts, **options)

    # The function behind `calibrate`. It decodes, so it lives in kvcomp.hf; `kvcomp` sets it here.
    _calibrate: ClassVar[Callable[..., Any]]

    @property
    def moves_keys(self) -> bool:
        """Whether the method needs to know how keys are rotated (`cache.inv_freq`)."""
        return False

    @property
    def attention(self) -> Method:
        """The method whose hooks run within a context: itself, unless it makes the contexts."""
        return self

    def check(self, num_layers: int) -> None:
        """Raise ValueError if the parameters do not fit a model of `num_layers` layers."""

    def start(self, cache: KVCache) -> None:
        """Called for new sequences and after a reset."""

    def prefill(self, layer: LayerCache, q: Tensor) -> None:
        """Called when a prompt is in `layer`; q [B, Hq, n, D] are its queries."""

    def context(self, layer: LayerCache) -> tuple[Rows, Tensor]:
        """The K and V that several new tokens attend to. They are in `layer` already and come last.

        Returns:
            rows [B, H, n, ...] and lens [B] int32: row b is valid up to lens[b].
        """
        return layer.stored(), layer.seq_lens

    def attend(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        """One decode step of a layer that has the new K and V: q [B, Hq, D] -> out [B, Hq, D]."""
        return layer.attend(q, scale)[0]

    def verify(self, layer: LayerCache, q: Tensor, scale: float) -> Tensor:
        """The drafts staged in `layer` attend: q [B, Hq, m, D] -> out [B, m, Hq, D]. Each attends
        as a decode step at its position would. The method may leave notes about them in
        `layer.drafts`; nothing else may change."""
        return layer.attend_staged(q, scale)[0]

    def accept(self, layer: LayerCache, index: int) -> None:
        """Draft `index` has become the newest token of `layer`. Store the notes that `attend` would
        have stored in its step. `end_step` and `between_steps` are called afterwards, as always."""

    @property
    def notes_steps(self) -> bool:
        """Whether something is noted or done in each step, so that accepted drafts are taken one by
        one. A method that says what `accept` or `between_steps` do does."""
        return any(definer(type(self), name) is not Method for name in ("accept", "between_steps"))

    def end_verify(self, cache: KVCache) -> None:
        """Called when no drafts are staged any more."""

    def room(self, cache: KVCache) -> float:
        """The number of tokens that may be accepted at once, up to which the cache is the same as
        after single decode steps."""
        return math.inf

    @property
    def drafts_refused(self) -> str | None:
        """The reason why drafts cannot be verified under this method; None: they can."""
        attends, verifies = (definer(type(self), name) for name in ("attend", "verify"))
        if issubclass(verifies, attends):
            return None
        return "it does not say how several tokens attend at once"

    @property
    def dense_up_to(self) -> float:
        """The number of tokens up to which a decode step attends to the whole row."""
        return math.inf

    def end_step(self, cache: KVCache) -> None:
        """Called after the last layer of a decode step, as a part of the step."""

    def between_steps(self, cache: KVCache) -> None:
        """Called after a decode step, and outside its graph if it is one, for decisions that the
        host makes by counting steps (`cache.steps`)."""

    def prompts(self, cache: KVCache) -> list[Tensor] | None:
        """For each layer the number of prompt tokens [B]. Methods that treat prompt and output
        differently return it once there is output. When a model encodes the whole text again,
        `cache.state.prompts` has this value; None means that all incoming tokens are prompt."""
        return None

    def rewind(self, cache: KVCache, columns: int) -> int:
        """Forget all but the first `columns` columns exactly, as if no others had been added.

        Returns:
            the number of columns that stay: fewer if the method cannot go back to exactly that
            point, 0 if it must start again.
        """
        if not self.croppable:
            cache.reset()
            return 0
        for layer in cache.layers:  # each for itself: an error may have left some with more
            layer.crop(layer.columns - columns)
        return columns

    def step_bytes(self, at: Place) -> StepBytes:
        """The bytes that a decode step of one sequence moves and holds, computed by a formula for
        `kvcomp plan`. By default everything is read and kept.
        """
        whole = at.seen * at.layers * at.token_bytes
        return StepBytes(read=whole, held=whole)


def definer(cls: type, name: str) -> type:
    """The class that an attribute comes from."""
    return next(base for base in cls.__mro__ if name in base.__dict__)
