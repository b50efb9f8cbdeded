"""Delethink on an engine: thinking in chunks through an OpenAI-compatible completions endpoint.

The method needs nothing but prompts and limits, so vLLM, SGLang or `transformers serve` can do the
decoding, many problems at once. The schedule is that of `kvcomp.Delethink`, and every finished
chunk is in a log from which a run goes on. Needs openai: pip install 'kvcomp[trace]'.
"""

from kvcomp.delethink.engine import EngineError, Sampling
from kvcomp.delethink.loop import trace
from kvcomp.delethink.problems import read_problems
from kvcomp.delethink.results import Run, Trace, TraceError

__all__ = ["EngineError", "Run", "Sampling", "Trace", "TraceError", "read_problems", "trace"]
