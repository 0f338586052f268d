"""What a model's heads tell of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from andromeda.checkpoint import load_checkpoint, resolve
from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer
from andromeda.training.nebula.heads import Head, load_heads
from andromeda.training.nebula.packing import encode_inputs, pack

AT_ONCE = 32  # inputs


class Predictor:
    """A model and its heads.

    Args:
        heads: by the name of their task.
    """

    def __init__(self, model: Andromeda, tokenizer: Tokenizer, heads: dict[str, Head]) -> None:
        self.model, self.tokenizer, self.heads = model.eval(), tokenizer, heads

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> Predictor:
        """Of a model directory, or of the newest checkpoint of a run.

        Raises:
            AndromedaError: it is no model directory, has no heads, or is damaged.
        """
        folder = resolve(directory)
        heads = load_heads(folder)
        if not heads:
            raise AndromedaError(f"{folder}: has no heads; train it by a recipe with `tasks` that have some")
        model = load_checkpoint(folder, device=device)
        for name, head in heads.items():
            if head.in_features != model.config.dim:
                raise AndromedaError(
                    f"{folder}: the head {name!r} reads {head.in_features} numbers, and the model has "
                    f"{model.config.dim}; copy the whole directory again"
                )
        return cls(model, Tokenizer.load(folder), {name: head.to(device) for name, head in heads.items()})

    def predict(self, texts: Sequence[str], task: str) -> list[str] | list[list[str]] | list[float]:
        """Of each text its class, its labels, or its value.

        Raises:
            AndromedaError: there is no such head.
        """
        return self._head(task).spec.target.decode(self.scores(texts, task))

    @torch.inference_mode()
    def scores(self, texts: Sequence[str], task: str) -> Tensor:
        """(N, size) float32 of the head, on the CPU: logits of classes or labels, or the standardised value.

        Texts longer than the model's max_seq_len lose their beginning, as in training.
        """
        head, most = self._head(task), self.model.config.max_seq_len
        inputs, _ = encode_inputs(self.tokenizer, texts, most)
        device = head.weight.device
        scores = [torch.zeros(0, head.out_features)]
        for first in range(0, len(inputs), AT_ONCE):
            packed = pack(inputs[first : first + AT_ONCE], most).to(device)
            scores.append(head.read(self.model.hidden(packed.ids, documents=packed.documents), packed).cpu())
        return torch.cat(scores)

    def _head(self, task: str) -> Head:
        if task not in self.heads:
            raise AndromedaError(f"no head {task!r}; there are: {', '.join(self.heads)}")
        return self.heads[task]
