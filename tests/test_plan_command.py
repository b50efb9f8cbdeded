"""`kvcomp plan` on the command line."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")


from kvcomp import METHODS, cli
from plan_configs import CONFIGS, QWEN3, R1_7B, agrees

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS[QWEN3]))
    return file


@pytest.fixture
def call(capsys):
    def run(*args):
        code = cli.main(["plan", *map(str, args)])
        return code, *capsys.readouterr()

    return run


def test_command_prints_every_method(call, config_file):
    code, out, _ = call(config_file, "--batch", 64, "--context", 8192, "--device", "h200")
    assert code == 0
    for word in ("16.4 GB", "15.1 GB", "144 KiB", "h200", "21.5 ms", "84%", "batch 64 fits"):
        assert word in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for name, method in METHODS.items():
        assert (name in lines) == (not method.baseline or name == "full")
    assert "2.6" in lines["delta"] and "135 tokens" not in out
    code, out, _ = call(config_file, "--method", "all", "--device", "h200", "--memory", 10)
    assert code == 0 and all(name in out for name in METHODS)
    assert "does not fit, nor do the weights alone" in out


def test_methods_that_need_more_layers_are_left_out_of_all(call, config_file):
    config_file.write_text(json.dumps({**CONFIGS[QWEN3], "num_hidden_layers": 2}))
    code, out, err = call(config_file, "--method", "all", "--device", "h200", "--json")
    left_out = set(METHODS) - {row["method"] for row in json.loads(out)["rows"]}
    assert code == 0 and left_out == {"arkvale", "cluster-kv", "free-kv", "quest"}
    assert "left out: Quest: dense_layers: expected fewer than the 2 layers" in err
    code, _, err = call(config_file, "--method", "quest", "--device", "h200")
    assert code == 2 and "error: Quest: dense_layers: expected fewer than the 2" in err


def test_its_page_shows_what_it_prints(call, tmp_path):
    """The table, and what is said about a batch of one, by the command that stands above them."""
    page = (Path(__file__).parents[1] / "docs" / "plan.md").read_text()
    command = re.search(r"^kvcomp plan Qwen/Qwen3-8B (.*)$", page, flags=re.MULTILINE).group(1)
    table = page.partition("| tokens attended | step, at least |")[2].partition("\n\n")[0]
    shown = {line.split()[1].strip("`"): line.split("|")[2:-1] for line in table.splitlines()[2:]}
    folder = tmp_path / QWEN3
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[QWEN3]))
    found = json.loads(call(folder, *command.split(), "--json")[1])
    assert set(shown) == {row["method"] for row in found["rows"]}
    for row in found["rows"]:
        attended, ms, speedup, sequences = (cell.strip() for cell in shown[row["method"]])
        assert attended == f"{row['attended']:.0f}" and ms == f"{row['floor_ms']:.3g} ms"
        assert speedup == f"{row['speedup']:.2f}x" and sequences == str(row["sequences"])
    alone = json.loads(call(folder, "--device", "h200", "--method", "all", "--json")[1])
    best, percent = re.search(r"can give there is (\S+)x: (\d+) %", page).groups()
    assert agrees(max(row["speedup"] for row in alone["rows"]), best)
    assert agrees(100 * (1 - alone["kv_share"]), percent)


def test_command_json(call, config_file):
    code, out, _ = call(
        *(config_file, "--json", "--bandwidth", 1000, "--memory", 20, "--batch", 2),
        *("--context", 4096, "--prompt-tokens", 96, "--generate", 4000, "--dtype", "float16"),
    )
    assert code == 0
    found = json.loads(out)
    assert found["model"]["dtype"] == "float16" and found["model"]["layers"] == 36
    assert found["device"]["bandwidth"] == 1e12 and found["device"]["memory"] == 2e10
    assert (found["context"], found["batch"], found["prompt"]) == (4096, 2, 96)
    assert found["kv_total"] == 2 * 4096 * found["kv_per_token"]
    assert found["floor_ms"] == pytest.approx((found["weights_read"] + found["kv_total"]) / 1e9)
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == {"full", *(name for name in METHODS if not METHODS[name].baseline)}
    assert rows["lazy-eviction"]["longest"] is None
    for row in rows.values():
        assert row["speedup_generation"] >= 1 and row["parameters"]


def test_command_gives_each_method_its_options(call, config_file):
    code, out, _ = call(
        *(config_file, "--json", "--device", "h200", "--budget", 2048, "--chunk", 1024),
        *("--set", "page_size=32", "--set", "lazy-eviction.window=64", "--set", "window=512"),
    )
    assert code == 0
    rows = {row["method"]: row["parameters"] for row in json.loads(out)["rows"]}
    assert "budget=2048, page_size=32" in rows["delta"]
    assert "budget=2048, window=64" in rows["lazy-eviction"]
    assert "window=512" in rows["louis-kv"]
    assert "chunk=1024, carry=512" in rows["delethink"]
    code, out, _ = call(
        *(config_file, "--json", "--device", "h200", "--method", "delethink", "--inner", "delta"),
        *("--budget", 512, "--set", "inner.recent=4", "--set", "head=10"),
    )
    assert code == 0
    (row,) = json.loads(out)["rows"][1:]
    for part in ("head=10", "Delta(budget=512, page_size=8, recent=4"):
        assert part in row["parameters"]


def test_command_knows_published_layers(call, tmp_path):
    folder = tmp_path / R1_7B
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[R1_7B]))
    for model in (folder, folder / "config.json"):
        _, out, _ = call(model, "--json", "--device", "h200", "--method", "delta")
        found = json.loads(out)
        assert found["model"]["name"] == R1_7B
        assert "delta_layers=(2, 14, 22)" in found["rows"][1]["parameters"]


def test_command_measures_this_machine(call):
    code, out, _ = call("reasoner", "--device", "cpu", "--context", 512, "--json")
    found = json.loads(out)
    assert code == 0 and found["device"]["name"] == "cpu"
    assert found["device"]["bandwidth"] > 1e8 and found["device"]["memory"] > 1e8
    assert found["device"]["source"].startswith("measured: read")
    assert found["fits"]


def test_command_takes_the_size_of_quantized_weights(call, config_file):
    fields = {**CONFIGS[QWEN3], "quantization_config": {"quant_method": "awq", "bits": 4}}
    config_file.write_text(json.dumps(fields))
    code, out, err = call(config_file, "--device", "h200")
    assert code == 2 and "quantized" in err and "--weights" in err
    code, out, _ = call(config_file, "--device", "h200", "--weights", 5, "--json")
    model = json.loads(out)["model"]
    assert code == 0 and model["weights"] == 5e9
    assert model["fixed"] / model["weights"] == pytest.approx(15.136 / 16.381, rel=1e-3)
    assert agrees(model["parameters"] / 1e9, "7.57")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"model_type": "llama", "hidden_size": 600, "num_attention_heads": 9},
            "600. is not a mul",
        ),
        ({"model_type": "llama", "num_hidden_layers": "many"}, "num_hidden_layers"),
        ([1], "model_type"),
    ],
)
def test_a_config_that_is_not_right_is_one_line(call, config_file, config, reason):
    config_file.write_text(json.dumps(config))
    code, out, err = call(config_file, "--device", "h200")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert re.match(f"kvcomp: error: cannot load config .*{reason}", err)
