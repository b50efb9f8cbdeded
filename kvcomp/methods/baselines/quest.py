"""Quest: pages by the largest logit that their keys allow (arXiv 2406.10774).

A page's digest is the maximum and the minimum of each channel of its keys; the bound of a query is
the sum over channels of the larger of q * max and q * min. Selection at every step. Differences:
the pages live in host memory, as for all retrieval methods here (in the paper all stay and only
reads are saved), and the heads of a group share a set.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcomp.methods.baselines._pages import PagedRetrieval


@dataclass(frozen=True)
class Quest(PagedRetrieval, name="quest", baseline=True):
    """Min-max pages, selected at every step."""
