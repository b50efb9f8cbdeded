"""kvcomp under Hugging Face transformers: attention function, cache and patch (``kvcomp[hf]``)."""

from kvcomp.cache import Report
from kvcomp.hf.cache import Cache
from kvcomp.hf.chunked_run import ChunkedRun
from kvcomp.hf.decode import answer_loss, decode_all
from kvcomp.hf.patch import patch
from kvcomp.hf.run import Run
from kvcomp.hf.static_run import StaticRun

__all__ = [
    "Cache",
    "ChunkedRun",
    "Report",
    "Run",
    "StaticRun",
    "answer_loss",
    "decode_all",
    "patch",
]
