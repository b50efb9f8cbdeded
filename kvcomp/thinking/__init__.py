"""Strategies of long reasoning that need no training, over any KV method. Needs kvcomp[hf].

Some act while a model decodes: they are logits processors of `generate` under `kvcomp.patch`.
Others drive the model themselves, and take the run that `kvcomp.patch` returns. docs/thinking.md
says what each changes, costs and needs.
"""

from kvcomp.thinking.ask import Ask
from kvcomp.thinking.cgrs import Cgrs
from kvcomp.thinking.concise_hint import ConciseHint
from kvcomp.thinking.dser import dser
from kvcomp.thinking.follow import Followed, follow_leader
from kvcomp.thinking.many import think
from kvcomp.thinking.noise import GumbelNoise
from kvcomp.thinking.pdr import pdr, sr
from kvcomp.thinking.rows import Row, Rows, Sampling
from kvcomp.thinking.short_m import majority, short_m_at_k
from kvcomp.thinking.stand import Stand
from kvcomp.thinking.stopping import BudgetForcing, StopScale
from kvcomp.thinking.strategies import STRATEGIES, Chosen
from kvcomp.thinking.trajectory import LatentTrajectory, latent_trajectory
from kvcomp.thinking.votes import Reply, Result, boxed, vote
from kvcomp.thinking.words import end_of_thinking

__all__ = [
    "STRATEGIES",
    "Ask",
    "BudgetForcing",
    "Cgrs",
    "Chosen",
    "ConciseHint",
    "Followed",
    "GumbelNoise",
    "LatentTrajectory",
    "Reply",
    "Result",
    "Row",
    "Rows",
    "Sampling",
    "Stand",
    "StopScale",
    "boxed",
    "dser",
    "end_of_thinking",
    "follow_leader",
    "latent_trajectory",
    "majority",
    "pdr",
    "short_m_at_k",
    "sr",
    "think",
    "vote",
]
