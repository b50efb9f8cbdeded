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

from kvcomp.models import folder
from language.texts import Window

BLOCK = 16  # steps whose distributions are formed at once


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
            raise ValueError("kvcomp.language: the model has no LM head")
        self.head = head
        self.hidden = self._load()

    def _load(self) -> Tensor:
        name = f"{self.model.config._name_or_path} {self.model.dtype} {self.prompt}"
        key = hashlib.sha256(name.encode() + self.ids.cpu().numpy().tobytes()).hexdigest()[:24]
        file = folder().parent / "language" / f"{key}.pt"
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
    def compare(self, hidden: Tensor, rows: slice) -> list[dict[str, float]]:
        """A method's hidden states [rows, steps, width] against the dense ones, window by window.

        Returns:
            nll and d_nll in nats per token, kl and kl99 (mean and 99 % quantile over steps) of the
            method's distribution from the dense one, and top1, the share of equal best tokens.
        """
        found = []
        targets = self.ids[rows, self.prompt + 1 :]
        for mine, dense, wanted in zip(hidden, self.hidden[rows], targets, strict=True):
            nll, dense_nll, kl, same = [], [], [], []
            for start in range(0, len(wanted), BLOCK):
                part = slice(start, start + BLOCK)
                p = self._log_probabilities(mine[part])
                q = self._log_probabilities(dense[part])
                at = wanted[part, None]
                nll.append(-p.gather(1, at))
                dense_nll.append(-q.gather(1, at))
                kl.append(kl_div(p, q, log_target=True, reduction="none").sum(-1))
                same.append(p.argmax(-1) == q.argmax(-1))
            nll, dense_nll = torch.cat(nll).double(), torch.cat(dense_nll).double()
            kl = torch.cat(kl).double().clamp(min=0)
            found.append(
                {
                    "nll": nll.mean().item(),
                    "d_nll": (nll - dense_nll).mean().item(),
                    "kl": kl.mean().item(),
                    "kl99": kl.quantile(0.99).item(),
                    "top1": torch.cat(same).double().mean().item(),
                }
            )
        return found

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        return self.head(hidden).float().log_softmax(-1)
