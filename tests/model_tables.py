"""The table of architectures and methods in docs/models.md.

It stands between HTML comments, is made from what the cells of test_model_matrix.py found, and is
read back from the page.
"""

from __future__ import annotations

import re
from pathlib import Path

Cell = tuple[str, str, str]  # architecture, method, case
EXACT = "exact"  # the outcome of a cell that holds; any other is the reason of a refusal
MARK = "models: made by tests/test_model_matrix.py"
CASES = ("padded batch", "two turns", "beams")

# What these architectures are known by; text models only.
FAMILIES = {
    "llama": "Llama 2 and 3, R1-Distill-Llama",
    "qwen2": "Qwen2, Qwen2.5, QwQ, R1-Distill-Qwen",
    "qwen3": "Qwen3, dense",
    "qwen3_moe": "Qwen3, mixture of experts",
    "mistral": "Mistral without a sliding window",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text",
    "phi": "Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-4",
    "gpt_oss": "gpt-oss",
    "smollm3": "SmolLM3",
    "olmo3": "OLMo 3",
    "glm4": "GLM-4-0414, GLM-Z1",
    "granite": "Granite 3",
    "cohere2": "Command R7B, Command A",
    "deepseek_v3": "DeepSeek-V3 and R1",
    "qwen3_next": "Qwen3-Next",
}
NEW = {"olmo3", "cohere2"}  # transformers before 5.17 cannot make their configurations


def whole(outcomes: dict[Cell, str], classes: dict[str, str]) -> str:
    """A row per architecture, a column per method; a refusal is a number, and its reason below."""
    kinds, names, cases = axes(outcomes)
    reasons = list(dict.fromkeys(text for text in outcomes.values() if text != EXACT))
    lines = [
        row("architecture", "class", "models", *(f"`{name}`" for name in names)),
        "|---" * (3 + len(names)) + "|",
    ]
    for kind in kinds:
        found = [[outcomes[kind, name, case] for case in cases] for name in names]
        texts = [
            " / ".join(EXACT if each == EXACT else f"[{reasons.index(each) + 1}]" for each in cell)
            for cell in found
        ]
        lines.append(row(f"`{kind}`", f"`{classes[kind]}`", FAMILIES[kind], *texts))
    lines.append("")
    lines += [f"* [{number}] refused: {text}" for number, text in enumerate(reasons, 1)]
    return "\n".join(lines)


def parse(page: Path) -> dict[Cell, str]:
    """What the table of `whole` says, cell by cell."""
    text = read(page)
    reasons = dict(re.findall(r"^\* (\[\d+\]) refused: (.*)$", text, flags=re.MULTILINE))
    head, _, *body = [line for line in text.splitlines() if line.startswith("|")]
    names = re.findall("`([^`]+)`", head)
    found = {}
    for line in body:
        kind, _, _, *cells = (part.strip().strip("`") for part in line.strip("|").split("|"))
        for name, cell in zip(names, cells, strict=True):
            for case, outcome in zip(CASES, cell.split(" / "), strict=True):
                found[kind, name, case] = reasons.get(outcome, outcome)
    return found


def axes(outcomes: dict[Cell, str]) -> list[list[str]]:
    """Architectures, methods and cases, in their order."""
    return [list(dict.fromkeys(axis)) for axis in zip(*outcomes, strict=True)]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def read(page: Path, mark: str = MARK) -> str:
    """What stands between the comments."""
    begin, end = comments(mark)
    return page.read_text().partition(begin)[2].partition(end)[0].strip("\n")


def comments(mark: str) -> tuple[str, str]:
    return f"<!-- {mark} -->", f"<!-- {mark.partition(':')[0]}: end -->"


def write(page: Path, table: str, mark: str = MARK) -> None:
    """Put a table between them."""
    before, begin, rest = page.read_text().partition(comments(mark)[0])
    _, end, after = rest.partition(comments(mark)[1])
    if not begin or not end:
        raise ValueError(f"{page.name} has no place for the table of {mark}")
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}")
