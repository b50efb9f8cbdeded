"""Quest: pages selected by the largest logit that their keys allow (arXiv 2406.10774).

The digest of a page is the maximum and the minimum of each channel of its keys. The bound for a
query is the sum over channels of the larger of q * max and q * min. Pages are selected at every
step. Differences: the pages are in host memory, as in all retrieval methods here (in the paper they
stay on the device, and only reads are saved), and the heads of a group share a set.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcomp.methods.baselines._pages import PagedRetrieval


@dataclass(frozen=True)
class Quest(PagedRetrieval, name="quest", baseline=True):
    """Min-max pages, selected at every step."""
