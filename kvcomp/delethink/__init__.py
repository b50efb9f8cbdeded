"""Delethink on a server: reasoning in chunks through an OpenAI-compatible completions endpoint.

The method needs only prompts and length limits, so vLLM, SGLang or `transformers serve` can decode
many problems at once. `kvcomp.Delethink` gives the schedule. Every finished chunk goes to a log,
and a run with the same log resumes where the last one stopped. Needs openai:
pip install 'kvcomp[delethink]'.
"""

from kvcomp.delethink.engine import EngineError, Sampling
from kvcomp.delethink.loop import trace
from kvcomp.delethink.results import Run, Trace, TraceError
from kvcomp.problems import read_problems

__all__ = ["EngineError", "Run", "Sampling", "Trace", "TraceError", "read_problems", "trace"]
