"""Hugging Face transformers: one attention function, one cache, one patch. Needs ``kvcomp[hf]``."""

from kvcomp.hf.cache import Cache
from kvcomp.hf.patch import Run, decode_all, patch
from kvcomp.hf.report import Report

__all__ = ["Cache", "Report", "Run", "decode_all", "patch"]
