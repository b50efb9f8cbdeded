"""Caches for the K and V of one layer and of one batch of sequences, without transformers."""

from kvcomp.cache.host_pool import HostMemoryError
from kvcomp.cache.kv_cache import KVCache
from kvcomp.cache.layer import LayerCache
from kvcomp.cache.meter import Meter
from kvcomp.cache.report import Report
from kvcomp.cache.static import StaticKVCache
from kvcomp.cache.static_meter import StaticMeter

__all__ = [
    "HostMemoryError",
    "KVCache",
    "LayerCache",
    "Meter",
    "Report",
    "StaticKVCache",
    "StaticMeter",
]
