"""The methods, one file each: import line here, and it is in METHODS."""

from kvcomp.methods.base import METHODS, Method
from kvcomp.methods.baselines.h2o import H2O
from kvcomp.methods.baselines.lagkv import LagKV
from kvcomp.methods.baselines.lm_infinite import LMInfinite
from kvcomp.methods.baselines.raas import RaaS
from kvcomp.methods.baselines.random_eviction import RandomEviction
from kvcomp.methods.baselines.random_pages import RandomPages
from kvcomp.methods.baselines.recency_window import RecencyWindow
from kvcomp.methods.baselines.rkv import RKV
from kvcomp.methods.baselines.snapkv import SnapKV
from kvcomp.methods.baselines.streaming_llm import StreamingLLM
from kvcomp.methods.baselines.tova import TOVA
from kvcomp.methods.delta import Delta
from kvcomp.methods.full import Full
from kvcomp.methods.lazy_eviction import LazyEviction

__all__ = [
    "H2O",
    "METHODS",
    "RKV",
    "TOVA",
    "Delta",
    "Full",
    "LMInfinite",
    "LagKV",
    "LazyEviction",
    "Method",
    "RaaS",
    "RandomEviction",
    "RandomPages",
    "RecencyWindow",
    "SnapKV",
    "StreamingLLM",
]
