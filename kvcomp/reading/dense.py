"""What dense attention says of the windows, computed once: a forward pass, no decode steps.

Kept are the hidden states before the LM head, from which every distribution over the vocabulary
follows; they are small, and a file of them beside the fetched models serves later runs.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from kvcomp.models.place import folder
from kvcomp.reading.texts import Window

BLOCK = 32  # steps whose distributions are formed at once


class Dense:
    """The windows, and the dense model's hidden states in each step.

    Attributes:
        ids: [windows, tokens] int64.
        prompt: tokens that are not predicted by decode steps.
        hidden: [windows, steps, width]; step s read token prompt + s, and predicts the next.
    """

    def __init__(self, model: Any, windows: list[Window], prompt: int) -> None:
        self.model, self.windows, self.prompt = model, windows, prompt
        self.ids = torch.tensor([window.ids for window in windows], device=model.device)
        self.steps = self.ids.shape[1] - prompt - 1
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError("kvcomp.reading: the model has no LM head")
        self.head = head.weight.float()
        self.hidden = self._load()

    def _load(self) -> Tensor:
        name = f"{self.model.config._name_or_path} {self.model.dtype} {self.prompt}"
        key = hashlib.sha256(name.encode() + self.ids.cpu().numpy().tobytes()).hexdigest()[:24]
        file = folder().parent / "reading" / f"{key}.pt"
        if file.exists():
            return torch.load(file, weights_only=True).to(self.model.device)
        hidden = self._forward()
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".part")
        torch.save(hidden.cpu(), beside)
        beside.replace(file)
        return hidden

    @torch.no_grad()
    def _forward(self) -> Tensor:
        decoder = self.model.get_decoder()
        rows = [
            decoder(row[None, :-1], use_cache=False).last_hidden_state[0, self.prompt :]
            for row in self.ids
        ]
        return torch.stack(rows)

    @torch.no_grad()
    def compare(self, hidden: list[Tensor], rows: slice) -> list[list[dict[str, float]]]:
        """Methods' hidden states, each [rows, steps, width], against the dense ones.

        Returns:
            of each method and window: nll and d_nll in nats per token, kl and kl99 (mean and 99 %
            quantile over steps) of the method's distribution from the dense one, and top1, the
            share of equal best tokens. Logits are formed in fp32.
        """
        targets = self.ids[rows, self.prompt + 1 :]
        return [
            list(each)
            for each in zip(
                *(
                    self._window([h[row] for h in hidden], dense, wanted)
                    for row, (dense, wanted) in enumerate(
                        zip(self.hidden[rows], targets, strict=True)
                    )
                ),
                strict=True,
            )
        ]

    def _window(self, hidden: list[Tensor], dense: Tensor, wanted: Tensor) -> list[dict]:
        seen: list[list[Tensor]] = [[] for _ in hidden]
        for start in range(0, len(wanted), BLOCK):
            part = slice(start, start + BLOCK)
            q, at = self._log_probabilities(dense[part]), wanted[part, None]
            for mine, found in zip(hidden, seen, strict=True):
                p = self._log_probabilities(mine[part])
                kl = kl_div(p, q, log_target=True, reduction="none").sum(-1)
                same = p.argmax(-1) == q.argmax(-1)
                nll, d_nll = -p.gather(1, at)[:, 0], (q - p).gather(1, at)[:, 0]
                found.append(torch.stack([nll, d_nll, kl, same.float()]).double())
        return [_figures(torch.cat(found, 1)) for found in seen]

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden.float(), self.head).log_softmax(-1)


def _figures(steps: Tensor) -> dict[str, float]:
    """Of [nll, d_nll, kl, same] x steps."""
    nll, d_nll, kl, same = steps
    return {
        "nll": nll.mean().item(),
        "d_nll": d_nll.mean().item(),
        "kl": kl.clamp(min=0).mean().item(),
        "kl99": kl.quantile(0.99).item(),
        "top1": same.mean().item(),
    }
