"""Imports point one way, and importing kvcomp needs no Triton, transformers or openai."""

import ast
import subprocess
import sys
from pathlib import Path

import kvcomp

ROOT = Path(kvcomp.__file__).parent
ORDER = ["ops", "cache", "methods", "hf"]  # each may import itself and those before it
FORBIDDEN_BELOW_HF = {"transformers", "kvcomp.testing", "kvcomp.selftest", "kvcomp.cli"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_one_way():
    for rank, room in enumerate(ORDER):
        above = {f"kvcomp.{name}" for name in ORDER[rank + 1 :]}
        above |= FORBIDDEN_BELOW_HF if room != "hf" else {"kvcomp.cli"}
        for path in (ROOT / room).rglob("*.py"):
            wrong = {
                n for n in imported(path) if any(n == a or n.startswith(a + ".") for a in above)
            }
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_triton_stays_in_its_room():
    for path in ROOT.rglob("*.py"):
        if "triton" not in path.relative_to(ROOT).parts:
            assert not {n for n in imported(path) if n.split(".")[0] == "triton"}, path


def test_cold_import():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['triton', 'transformers', 'openai']));"
        "import kvcomp;"
        "assert not any(m.split('.')[0] == 'triton' and sys.modules[m] for m in sys.modules);"
        "kvcomp.ops.OPS['page_scores'].impl('cpu')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
