"""attend_and_select in Triton: the kernels of its three parts, one after the other."""

from __future__ import annotations

from kvcomp.ops.attend_and_select import in_turn
from kvcomp.ops.triton import decode_attention, page_scores, select_pages

launch = in_turn(decode_attention.launch, page_scores.launch, select_pages.launch)
