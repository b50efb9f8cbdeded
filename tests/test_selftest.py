"""kvcomp info --selftest: right here, and not silent about what is wrong."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer")

from kvcomp import cli, selftest
from kvcomp.ops import OPS
from kvcomp.ops.page_scores import fake as fake_page_scores
from kvcomp.selftest.cases import CASES


@pytest.fixture
def few_ops(monkeypatch):
    """Only these are tested, and may be replaced."""
    few = {name: OPS[name] for name in ("merge_states", "page_scores", "select_pages")}
    monkeypatch.setattr(selftest, "OPS", few)
    return few


def test_all_that_runs_here_is_right(capsys):
    assert cli.main(["info", "--selftest", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["selftest"]
    assert set(found) == set(OPS)
    for name, impls in found.items():
        cases = [case for case in CASES if case.op == name]
        runs = sum(len(case.dtypes) for case in cases)
        taken = sum(len(case.dtypes) for case in cases if "cpu" not in case.refused_by)
        assert impls["cpu"] == {"state": "ok", "runs": taken}
        for impl in ("cuda", "triton"):
            if torch.cuda.is_available() and impl in OPS[name].impls:
                assert impls[impl] == {"state": "ok", "runs": runs}
            else:
                assert impls[impl]["state"] == "absent" and impls[impl]["reason"]


def test_what_is_wrong_is_found(few_ops, monkeypatch, capsys):
    right = few_ops["merge_states"].impls["cpu"]

    def slightly_off(*args):
        out, lse = right(*args)
        return out * 1.1, lse

    def failing(*args):
        raise RuntimeError("out of\nresources")

    monkeypatch.setitem(few_ops["merge_states"].impls, "cpu", slightly_off)
    monkeypatch.setitem(few_ops["select_pages"].impls, "cpu", failing)
    # Allocates and writes nothing: the outputs hold what was in memory before.
    monkeypatch.setitem(few_ops["page_scores"].impls, "cpu", fake_page_scores)
    found = selftest.run()
    assert not selftest.is_right(found)
    off, failed, gap = (found[x]["cpu"] for x in ("merge_states", "select_pages", "page_scores"))
    assert off["state"] == failed["state"] == gap["state"] == "wrong"
    assert off["wrong"] == off["runs"] == 9 and 1e-3 < off["error"] < 1
    assert failed["error"] is None and failed["message"] == "out of resources"
    assert gap["wrong"] == gap["runs"] and "NaN" in gap["message"]

    assert cli.main(["info", "--selftest"]) == 1
    out = capsys.readouterr().out
    assert out.count("WRONG in") == 3 and "out of resources" in out
    assert f"merge_states cpu, worst in {off['case']}: {off['message']}" in out


def test_it_leaves_torch_as_it_was_and_needs_no_test_framework(few_ops):
    settings = torch.utils.deterministic.fill_uninitialized_memory
    selftest.run()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == settings
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from kvcomp import selftest\n"
        "selftest.OPS = {'merge_states': selftest.OPS['merge_states']}\n"
        "right = selftest.OPS['merge_states'].impls['cpu']\n"
        "selftest.OPS['merge_states'].impls['cpu'] = lambda *args: right(*args)[::-1]\n"
        "raise SystemExit(selftest.is_right(selftest.run()))"
    )
    subprocess.run([sys.executable, "-O", "-c", code], check=True, timeout=120)  # without asserts
