"""Strategies of long reasoning that need no training, over any KV method. Needs kvcomp[hf].

Some act while a model decodes: they are logits processors of `generate` under `kvcomp.patch`.
Others drive the model themselves, and take the run that `kvcomp.patch` returns. docs/thinking.md
says what each changes, costs and needs.
"""

from kvcomp.thinking.cgrs import Cgrs
from kvcomp.thinking.concise_hint import ConciseHint
from kvcomp.thinking.stopping import BudgetForcing, StopScale
from kvcomp.thinking.words import end_of_thinking

__all__ = ["BudgetForcing", "Cgrs", "ConciseHint", "StopScale", "end_of_thinking"]
