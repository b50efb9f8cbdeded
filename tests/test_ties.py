"""Scores that should be equal are equal, and the choice among them is by age: the older leaves."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcomp import _C, Full
from kvcomp.methods import alike
from kvcomp.methods.baselines._prompt import prompt_probabilities
from slow import ties
from slow.eviction import assert_follows, new_cache

pytestmark = pytest.mark.usefixtures("one_thread")


def fp32(x):
    return torch.tensor(x, dtype=torch.float32)


def test_exp_and_logistic_round_to_what_they_are():
    for x in [0.0, -1e-9, -0.3, -1.0, -7.77, -33.3, -87.0, -103.9, -200.0, -math.inf]:
        x = fp32(x)
        assert torch.equal(alike.exp(x).float(), fp32(math.exp(x))), x
        assert torch.equal(alike.logistic(x).float(), fp32(1 / (1 + math.exp(min(-x, 700))))), x
    assert alike.exp(torch.tensor(torch.nan)).isnan()


def test_softmax_total_and_dots_are_what_torch_gives():
    x, y = torch.randn(3, 37, 64), torch.randn(3, 21, 64)
    x[0, 5], x[1, 3, ::2] = 0.0, -torch.inf
    torch.testing.assert_close(alike.softmax(x), x.softmax(-1))
    assert alike.softmax(torch.full((1, 4), -torch.inf)).isnan().all()
    x[1, 3] = 30.0 * torch.randn(64)
    for dim in range(3):
        torch.testing.assert_close(alike.total(x, dim), x.sum(dim), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(alike.dots(x, y), x @ y.transpose(1, 2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_inputs_give_equal_results_at_every_length(dtype):
    one, queries = torch.randn(2, 1, 32).to(dtype), torch.randn(2, 5, 32).to(dtype)
    for length in ties.LENGTHS:
        rows = one.expand(-1, length, -1).contiguous()
        columns = rows.transpose(1, 2).contiguous()
        results = {
            "logistic": alike.logistic(-columns.abs()),
            "softmax": alike.softmax(columns),
            "total": alike.total(columns, 1)[:, None],
            "exact total": alike.exact_total(columns / 8, 1)[:, None],
            "dots": alike.dots(queries, rows),
            "dots of all": alike.dots(rows, rows),
        }
        for name, result in results.items():
            assert torch.equal(result, result[..., :1].expand_as(result)), f"{name}, {length}"


@pytest.mark.parametrize("name", ties.EVICTING)
def test_ties_go_against_the_older_token(name):
    slow = ties.rounded(ties.EVICTING[name][2])
    for length in ties.LENGTHS:
        method, trace = ties.evicting(name, length)
        assert assert_follows(method, trace, slow), length


def test_a_prompt_gives_equal_keys_equal_probabilities():
    """H2O adds them up; the queries of a second turn see keys of one kind behind others."""
    for length in ties.LENGTHS:
        trace = ties.Tied(length, steps=3)
        trace.k[:, :, :, : length + 1] = trace.k[:, :, :, :1].clone()
        cache = new_cache(Full())
        trace.fill(cache)
        trace.fill(cache, [5], [length])
        (probs,) = prompt_probabilities(cache.layers[0], trace.q[0, :, :, length : length + 5])
        before = alike.total(probs, 2)[..., :length]
        assert torch.equal(before, before[..., :1].expand_as(before)), length


@pytest.mark.parametrize("name", [n for n in ties.EVICTING if ties.EVICTING[n][0].static])
def test_both_flavours_of_the_cache_choose_alike(name):
    for length in ties.LENGTHS:
        method, trace = ties.evicting(name, length)
        cache = new_cache(method)
        trace.run(cache)
        assert ties.kept_by_a_static_cache(method, trace) == ties.kept(cache), length


def test_every_instruction_set_chooses_alike():
    """Those of torch, in the names that it knows, with the kernels of each of ours."""

    def digest(torch_isa, own_isa):
        env = os.environ | {"ATEN_CPU_CAPABILITY": torch_isa, "KVCOMP_ISA": own_isa}
        env["PYTHONPATH"] = f"{Path(__file__).parent}{os.pathsep}{env['PYTHONPATH']}"
        command = [sys.executable, "-m", "slow.ties"]
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return run.stdout.split()[-1]

    native, here = _C.cpu_isa(), torch.backends.cpu.get_cpu_capability().lower()
    others = [isa for isa in ("default", "avx2", "avx512") if isa != here]
    pairs = [(here, native), (here, "scalar"), *((isa, native) for isa in others)]
    digests = {pair: digest(*pair) for pair in pairs}
    assert len(set(digests.values())) == 1, digests
