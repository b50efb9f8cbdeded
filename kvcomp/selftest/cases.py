"""Cases per op: the inputs that tests run on every implementation, small, odd and nasty.

A case makes the positional arguments of the op's schema. Floating inputs have the spread of real
attention (a few tokens hold most of the mass), lengths are ragged and odd, K and V come in the
layouts that caches have, and every table of cases holds length 1 and rows with nothing valid.
"""

from __future__ import annotations

from kvcomp.selftest.append_cases import append_cases
from kvcomp.selftest.attention_cases import attention_cases
from kvcomp.selftest.case import Case
from kvcomp.selftest.code_cases import code_cases
from kvcomp.selftest.engine_cases import engine_cases
from kvcomp.selftest.eviction_cases import eviction_cases
from kvcomp.selftest.latent_cases import latent_cases
from kvcomp.selftest.linear_cases import linear_cases, norm_cases, rotation_cases
from kvcomp.selftest.retrieval_cases import retrieval_cases
from kvcomp.selftest.selection_cases import selection_cases

CASES: list[Case] = sorted(
    [
        *append_cases(),
        *attention_cases(),
        *code_cases(),
        *engine_cases(),
        *eviction_cases(),
        *latent_cases(),
        *linear_cases(),
        *norm_cases(),
        *retrieval_cases(),
        *rotation_cases(),
        *selection_cases(),
    ],
    key=lambda case: case.op,
)
