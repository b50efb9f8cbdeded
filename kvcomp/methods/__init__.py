"""The methods, one file each. Importing a method here adds it to METHODS."""

from kvcomp.methods.base import METHODS, Method
from kvcomp.methods.baselines.arkvale import ArkVale
from kvcomp.methods.baselines.cluster_kv import ClusterKV
from kvcomp.methods.baselines.free_kv import FreeKV
from kvcomp.methods.baselines.h2o import H2O
from kvcomp.methods.baselines.lagkv import LagKV
from kvcomp.methods.baselines.less_is_more import LessIsMore
from kvcomp.methods.baselines.lm_infinite import LMInfinite
from kvcomp.methods.baselines.per_token_retrieval import PerTokenRetrieval
from kvcomp.methods.baselines.quest import Quest
from kvcomp.methods.baselines.raas import RaaS
from kvcomp.methods.baselines.random_eviction import RandomEviction
from kvcomp.methods.baselines.random_pages import RandomPages
from kvcomp.methods.baselines.recency_window import RecencyWindow
from kvcomp.methods.baselines.rkv import RKV
from kvcomp.methods.baselines.snapkv import SnapKV
from kvcomp.methods.baselines.streaming_llm import StreamingLLM
from kvcomp.methods.baselines.stride_retrieval import StrideRetrieval
from kvcomp.methods.baselines.tidal_decode import TidalDecode
from kvcomp.methods.baselines.tova import TOVA
from kvcomp.methods.delethink import Delethink
from kvcomp.methods.delta import Delta
from kvcomp.methods.full import Full
from kvcomp.methods.lazy_eviction import LazyEviction
from kvcomp.methods.louis_kv import LouisKV

__all__ = [
    "H2O",
    "METHODS",
    "RKV",
    "TOVA",
    "ArkVale",
    "ClusterKV",
    "Delethink",
    "Delta",
    "FreeKV",
    "Full",
    "LMInfinite",
    "LagKV",
    "LazyEviction",
    "LessIsMore",
    "LouisKV",
    "Method",
    "PerTokenRetrieval",
    "Quest",
    "RaaS",
    "RandomEviction",
    "RandomPages",
    "RecencyWindow",
    "SnapKV",
    "StreamingLLM",
    "StrideRetrieval",
    "TidalDecode",
]
