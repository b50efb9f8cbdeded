"""Hugging Face transformers: one attention function, one cache, one patch. Needs ``kvcomp[hf]``."""

from kvcomp.hf.cache import Cache
from kvcomp.hf.decode import answer_loss, decode_all
from kvcomp.hf.patch import Run, patch
from kvcomp.hf.report import Report
from kvcomp.hf.static import StaticRun

__all__ = ["Cache", "Report", "Run", "StaticRun", "answer_loss", "decode_all", "patch"]
