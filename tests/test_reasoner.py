"""The switch walk, its grader, and the bundled model that was trained for it."""

import subprocess
import sys
from pathlib import Path

import pytest

import kvcomp.reasoner
from kvcomp.reasoner import task

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "train_reasoner.py"


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(kvcomp.reasoner.path())


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(kvcomp.reasoner.path()).eval()


@pytest.mark.parametrize("nodes, steps", [(2, 5), (16, 64), (48, 512), (64, 32)])
def test_gold_is_graded_right(nodes, steps):
    problem = task.make_problem(nodes, steps, seed=3)
    gold = problem.gold()
    assert len(gold.split()) == steps * problem.tokens_per_step
    assert task.grade(problem, gold) == task.Grade(1.0, True, steps, 1.0)


def test_problems_are_deterministic():
    assert task.make_problem(16, 32, seed=5) == task.make_problem(16, 32, seed=5)
    assert task.make_problem(16, 32, seed=5).prompt != task.make_problem(16, 32, seed=6).prompt
    short, long = task.make_problem(16, 8, seed=5), task.make_problem(16, 32, seed=5)
    assert long.gold().startswith(short.gold())


@pytest.mark.parametrize("nodes", [16, 48])
def test_walks_keep_needing_old_facts(nodes):
    """Many facts are used, some never, and the silence before one comes back is uneven."""
    for seed in range(20):
        problem = task.make_problem(nodes, 512, seed)
        sources = [step[0] for step in problem.walk()]
        used, last, silences = set(sources), {}, []
        for i, source in enumerate(sources):
            silences.append(i - last.get(source, i))
            last[source] = i
        assert len(used) >= nodes  # of 2 * nodes facts
        assert {edge[0] for edge in problem.edges} - used
        assert max(silences) > nodes and min(s for s in silences if s) < nodes / 2


@pytest.mark.parametrize("word", range(4))
def test_one_wrong_word_costs_its_own_step_and_little_more(word):
    problem = task.make_problem(16, 40, seed=1)
    words = problem.gold().split()
    at = 20 * 4 + word
    pool = (task.SOURCES, task.NAMES, "0123456789", "0123456789")[word]
    words[at] = next(other for other in pool if other != words[at])
    grade = task.grade(problem, " ".join(words))
    # A wrong target or sum also makes the next step's source, or sum, not follow from it.
    assert 38 / 40 <= grade.step_accuracy <= 39 / 40
    assert not grade.final_correct


def test_a_slip_does_not_spoil_a_walk_that_goes_on_from_it():
    problem = task.make_problem(16, 40, seed=2)
    slip = problem.walk()[9]
    wrong = (slip[3] + 1) % 10
    detour = task.Problem(16, 30, problem.edges, slip[1], wrong)
    words = problem.gold().split()[:40]
    words[-1] = str(wrong)
    grade = task.grade(problem, " ".join(words) + " " + detour.gold())
    assert grade.step_accuracy == 39 / 40 and not grade.final_correct


def test_missing_and_malformed_steps_are_wrong():
    problem = task.make_problem(16, 40, seed=3)
    words = problem.gold().split()
    assert task.grade(problem, "").step_accuracy == 0
    assert task.grade(problem, " ".join(words[: 4 * 30])).step_accuracy == 30 / 40
    assert task.grade(problem, " ".join(words[: 4 * 30 + 2])).step_accuracy == 30 / 40
    assert task.grade(problem, " ".join(words) + " and more").final_correct
    for broken in ("", "ba", "<unk> <unk>"):  # for the weight of step 10
        text = " ".join([*words[:42], *broken.split(), *words[43:]])
        assert 36 / 40 <= task.grade(problem, text).step_accuracy < 39 / 40
    assert task.grade(problem, "noise " * 4 + problem.gold()).step_accuracy == 38 / 40


def test_first_visits_are_graded_by_themselves():
    problem = task.make_problem(16, 40, seed=4)
    words = problem.gold().split()
    used = [step[0] for step in problem.walk()]
    firsts = [i for i, source in enumerate(used) if source not in used[:i]]
    words[4 * firsts[-1] + 2] = "x"
    grade = task.grade(problem, " ".join(words[: 4 * firsts[-1] + 4]))
    assert grade.first_visit_accuracy == pytest.approx((len(firsts) - 1) / len(firsts))


def test_tokenizer_round_trips(tokenizer):
    problem = task.make_problem(48, 16, seed=0)
    for text in (problem.prompt, problem.gold()):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split()) + 1 and ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.get_vocab() == task.TOKEN_ID


def test_model_is_small_deep_and_grouped(model):
    config = model.config
    assert config.num_hidden_layers >= 8
    assert config.num_attention_heads > config.num_key_value_heads
    assert sum(p.numel() for p in model.parameters()) < 3e6
    assert sum(f.stat().st_size for f in Path(kvcomp.reasoner.path()).iterdir()) < 8e6


def test_model_walks(model, tokenizer):
    problems = [task.make_problem(16, 48, seed) for seed in (100, 101)]
    prompts = tokenizer([p.prompt for p in problems], return_tensors="pt")
    new = 48 * problems[0].tokens_per_step
    ids = model.generate(**prompts, do_sample=False, max_new_tokens=new)
    texts = tokenizer.batch_decode(
        ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
    )
    for problem, text in zip(problems, texts, strict=True):
        assert task.grade(problem, text).step_accuracy >= 0.95


def test_training_script_smoke(tmp_path):
    pytest.importorskip("rich")
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=ROOT)
    subprocess.run([*command, "--resume"], check=True, capture_output=True, timeout=120, cwd=ROOT)
    assert (tmp_path / "model.safetensors").exists()
