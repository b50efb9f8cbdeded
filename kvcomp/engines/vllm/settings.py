"""What a server was asked for: the `kvcomp` key of vLLM's additional configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kvcomp import Delta, Full, LazyEviction
from kvcomp.checks import is_count, require, require_one_of
from kvcomp.methods.fields import check_types


@dataclass(frozen=True)
class SinkWindow:
    """The first and the newest tokens, in whole blocks of the engine; the blocks between go back to
    its pool while the request runs.

    A prompt stays whole until all of it has been processed. Keys stay rotated for their true
    positions, so distances are the real ones (as in `RecencyWindow`, with sinks as in StreamingLLM,
    arXiv 2309.17453).

    Attributes:
        budget: tokens that a decode step attends to, rounded up to whole blocks.
        sinks: first tokens among them.
        free: whether the blocks are given back. False attends to the same tokens and keeps all: to
            compare with.
    """

    budget: int = 1024
    sinks: int = 4
    free: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        most = self.budget - 1
        expected = f"0 to budget - 1 = {most}"
        require(0 <= self.sinks <= most, "kvcomp.SinkWindow: sinks", expected, self.sinks)

    def check(self, num_layers: int) -> None:
        """It fits any number of layers."""


EngineMethod = Full | Delta | LazyEviction | SinkWindow
METHODS: dict[str, type[EngineMethod]] = {
    "full": Full,
    "delta": Delta,
    "lazy-eviction": LazyEviction,
    "sink-window": SinkWindow,
}


@dataclass(frozen=True)
class Settings:
    """A method, and how the engine cuts its cache into pages.

    Attributes:
        method: Full, Delta, LazyEviction or SinkWindow.
        page_size: tokens in a page of the block table that the backend gets; it divides the
            engine's blocks.
    """

    method: EngineMethod
    page_size: int = 16

    KEY: ClassVar[str] = "kvcomp"

    @classmethod
    def of(cls, vllm_config: Any) -> Settings | None:
        """Those of a vLLM configuration; None where it does not ask for kvcomp.

        Raises:
            TypeError, ValueError: no such method or field, a value that the method refuses.
        """
        extra = getattr(vllm_config, "additional_config", None)
        extra = extra if isinstance(extra, Mapping) else {}
        meant = [key for key in extra if str(key).strip().lower() == cls.KEY]
        if meant not in ([], [cls.KEY]) or (not meant and extra.get("method") in list(METHODS)):
            raise ValueError(
                f'{WHERE}: additional_config: expected {{"{cls.KEY}": {{"method": NAME, ...}}}},'
                f" got {dict(extra)!r}"
            )
        given = extra.get(cls.KEY)
        return None if given is None else cls.read(given)

    @classmethod
    def read(cls, given: Any) -> Settings:
        """As `of`, from the value of the key: {"method": NAME, FIELD: VALUE, ...}."""
        if not isinstance(given, Mapping) or "method" not in given:
            raise ValueError(f'{WHERE}: expected {{"method": NAME, FIELD: VALUE}}, got {given!r}')
        fields = dict(given)
        name = fields.pop("method")
        require_one_of(METHODS, f"{WHERE}: method", name)
        kind = METHODS[name]
        known = {field.name for field in dataclasses.fields(kind) if field.name != "group"}
        page = {"page_size": fields.pop("page_size", cls.page_size)}  # the engine's by default
        if unknown := sorted(set(fields) - known):
            raise ValueError(
                f"{WHERE}: {name} has no field {', '.join(unknown)}; its fields are"
                f" {', '.join(sorted(known | set(page)))}"
            )
        method = kind(**fields, **(page if "page_size" in known else {}))
        return cls(method, **page)

    def __post_init__(self) -> None:
        size = self.page_size
        require(is_count(size, 1), f"{WHERE}: page_size", "a number of tokens", size)
        if isinstance(self.method, LazyEviction):
            _check_lazy(self.method, size)

    @property
    def frees(self) -> bool:
        """Whether blocks go back to the pool while their request runs."""
        if isinstance(self.method, SinkWindow):
            return self.method.free
        return isinstance(self.method, LazyEviction)

    def refuse(self, vllm_config: Any) -> None:
        """Raise ValueError, with the reason, for a server that cannot run the method."""
        parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
        block, model = cache.block_size, vllm_config.model_config
        heads = _head_sizes(getattr(model, "hf_text_config", None))
        transfer = getattr(vllm_config, "kv_transfer_config", None)
        connector = getattr(transfer, "kv_connector", None)
        reasons = {
            "pipeline parallelism: a stage would lack the pages that one below it selected": (
                parallel.pipeline_parallel_size > 1
            ),
            "context parallelism": parallel.decode_context_parallel_size > 1
            or parallel.prefill_context_parallel_size > 1,
            "speculative decoding: a step has one query per request": (
                vllm_config.speculative_config is not None
            ),
            f"kv_cache_dtype={cache.cache_dtype}": cache.cache_dtype != "auto",
            "LoRA adapters, which have not been run": (
                getattr(vllm_config, "lora_config", None) is not None
            ),
            f"layers with heads of {' and of '.join(map(str, heads))}, which have not been run": (
                len(heads) > 1
            ),
            "latent attention, which vLLM runs by other backends": model is not None
            and model.use_mla,
            "a model without attention": model is not None and model.is_attention_free,
            f"page_size={self.page_size}, which does not divide the blocks of {block} tokens": (
                block is not None and block % self.page_size != 0
            ),
            "KV connectors and offloading, which have not been run": bool(
                connector not in (None, "DecodeBenchConnector")  # it only fills blocks with noise
                or getattr(cache, "kv_offloading_size", None)
            ),
            "prefix caching, as blocks leave a request while it runs; start with"
            " --no-enable-prefix-caching": self.frees and bool(cache.enable_prefix_caching),
        }
        for reason, applies in reasons.items():
            if applies:
                raise ValueError(f"{WHERE}: cannot run {self.method!r} with {reason}")
        most = getattr(getattr(model, "hf_text_config", None), "num_hidden_layers", None)
        if most and not model.is_encoder_decoder:  # what fits fewer layers fits these
            self.method.check(most)


def _head_sizes(config: Any) -> list[int]:
    """Those of a model's layers, where its configuration has one for each, as Gemma 4's does."""
    layers = getattr(config, "per_layer_config", None)
    if not layers:
        return []
    count = config.num_hidden_layers
    sizes = {getattr(layers[index], "head_dim", None) for index in range(count)}
    return sorted(size for size in sizes if size is not None)


def _check_lazy(method: LazyEviction, page: int) -> None:
    """Raise ValueError for what pages of an engine cannot do."""
    where = f"{WHERE}: lazy-eviction"
    require(method.unit == "kv_head", f"{where}: unit", "kv_head", method.unit)
    require(not method.keep_prompt, f"{where}: keep_prompt", "False", method.keep_prompt)
    for name in ("budget", "window"):
        value = getattr(method, name)
        require(value % page == 0, f"{where}: {name}", f"a multiple of page_size={page}", value)


WHERE = "kvcomp.engines.vllm"
