"""Imports point one way, and importing kvcomp needs no Triton, transformers or openai."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvcomp

ROOT = Path(kvcomp.__file__).parent
# Each may import itself and those before it; what is not here stands above all of them.
BELOW = ["_torch", "checks", "progress", "storage", "problems", "journal"]
ORDER = [*BELOW, "ops", "cache", "methods", "plan", "hf", "thinking", "delethink"]
TOPS = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
DOORS = {"import_module", "__import__"}  # by which a name in a string is imported
COMPUTED = "a computed name"


def imported(path: Path) -> set[str]:
    """Names of modules, and of what is taken from them; also those that are strings in a call, up
    to where they are computed. What only type checkers import does not count."""
    names = set()
    for node in run_by_python(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = ("kvcomp", *path.relative_to(ROOT).parts)[: -node.level]
                module = ".".join((*package, module)).rstrip(".")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in DOORS:
            first = node.args[0]
            first = first.values[0] if isinstance(first, ast.JoinedStr) else first
            names.add(first.value.rstrip(".") if isinstance(first, ast.Constant) else COMPUTED)
    return names


def run_by_python(tree: ast.AST):
    """All nodes but those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from run_by_python(node)


def files(room: str) -> list[Path]:
    return [*(ROOT / room).rglob("*.py"), *ROOT.glob(f"{room}.py")]


def under(name: str, tops: list[str]) -> bool:
    return any(name == top or name.startswith(top + ".") for top in tops)


@pytest.mark.parametrize("room", ORDER)
def test_one_way(room):
    above = [f"kvcomp.{name}" for name in TOPS - {"__init__", *ORDER[: ORDER.index(room) + 1]}]
    above.append(COMPUTED)
    if ORDER.index(room) < ORDER.index("hf"):
        above += ["transformers", "kvcomp.patch"]
    for path in files(room):
        wrong = {name for name in imported(path) if under(name, above)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_one_way_sees_names_in_strings(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import importlib\ndef f():\n    importlib.import_module('kvcomp.hf')\n"
        "def g(x): return __import__(f'kvcomp.cli.{x}')\n"
        "if TYPE_CHECKING:\n    import kvcomp.demo\n"
    )
    assert imported(path) == {"importlib", "kvcomp.hf", "kvcomp.cli"}


def test_no_circles():
    """Not between modules of one room either."""
    modules = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(("kvcomp", *parts)).removesuffix(".__init__")] = path

    def needed(path: Path) -> set[str]:  # a package is not, where just a module is taken from it
        names = imported(path) & set(modules)
        return {name for name in names if not any(under(x, [name]) for x in names - {name})}

    needs = {name: needed(path) - {name} for name, path in modules.items()}
    while needs:
        free = {name for name, of in needs.items() if not of & set(needs)}
        assert free, f"in circles: {sorted(needs)}"
        needs = {name: of for name, of in needs.items() if name not in free}


def test_private_parts_of_torch_stay_in_one_file():
    private = re.compile(r"torch\._[a-zA-Z]")
    for path in ROOT.rglob("*.py"):
        if path.name != "_torch.py":
            assert not private.search(path.read_text()), path


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
