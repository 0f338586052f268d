"""What a task makes small: one class a kind of loss, whose value is that of each element.

An element without a target counts nothing: IGNORED among whole numbers, NaN among others. Values are float32 or, of
float64, float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from andromeda.errors import AndromedaError
from andromeda.kernels import linear_cross_entropy
from andromeda.kernels.loss import LOSS_CHUNK
from andromeda.model import IGNORED


@dataclass(frozen=True)
class Unprojected:
    """Logits hidden @ weight.T that are not to be held.

    Attributes:
        hidden: (..., dim).
        weight: (V, dim).
    """

    hidden: Tensor
    weight: Tensor

    def logits(self) -> Tensor:
        """(..., V), after all."""
        return _wide(F.linear(self.hidden, self.weight))


@dataclass(frozen=True)
class Pair:
    """Log-probabilities, in nats, of the answers that are chosen and rejected: (N,) each."""

    chosen: Tensor
    rejected: Tensor


class Loss(Protocol):
    """A kind of loss.

    Attributes:
        scale: of a Gaussian likelihood's exponent, 1/2, and of a softmax, 1 (Kendall et al. 2018, equations 5 and 7).
    """

    scale: ClassVar[float]

    def __call__(self, prediction: Any, target: Any) -> Tensor:
        """The loss of each element, 0 where it counts nothing.

        Raises:
            AndromedaError: shapes that do not fit together.
        """
        ...

    def counts(self, target: Any) -> Tensor:
        """Which elements have a target: bool, of the values' shape."""
        ...


@dataclass(frozen=True)
class LanguageModel:
    """Cross-entropy of the next token. Prediction `Unprojected`, target (...) int64.

    Attributes:
        smoothing: share of the target's probability that goes to the whole vocabulary alike (Szegedy et al. 2016).
        z_loss: times the square of the log-sum-exp, added (Chowdhery et al. 2022, section 5).
    """

    smoothing: float = 0.0
    z_loss: float = 0.0
    scale: ClassVar[float] = 1.0

    def __call__(self, prediction: Unprojected, target: Tensor) -> Tensor:
        _same(prediction.hidden.shape[:-1], target.shape, "hidden (..., dim) and target (...)")
        hidden = prediction.hidden.reshape(-1, prediction.hidden.shape[-1])
        losses = linear_cross_entropy(hidden, prediction.weight, target.flatten(), IGNORED, self.smoothing, self.z_loss)
        return losses.view(target.shape)

    def counts(self, target: Tensor) -> Tensor:
        return target != IGNORED


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of one class out of C. Prediction (..., C) logits, target (...) int64."""

    smoothing: float = 0.0
    scale: ClassVar[float] = 1.0

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        _same(prediction.shape[:-1], target.shape, "logits (..., C) and target (...)")
        logits = _wide(prediction).reshape(-1, prediction.shape[-1])
        losses = F.cross_entropy(
            logits, target.flatten(), reduction="none", ignore_index=IGNORED, label_smoothing=self.smoothing
        )
        return losses.view(target.shape)

    def counts(self, target: Tensor) -> Tensor:
        return target != IGNORED


@dataclass(frozen=True)
class MultiLabel:
    """Binary cross-entropy, the mean over C labels. Prediction and target (..., C): logits, and bool or 0 to 1."""

    scale: ClassVar[float] = 1.0

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        _same(prediction.shape, target.shape, "logits (..., C) and target (..., C)")
        logits, counts = _wide(prediction), self.counts(target)
        known = torch.where(counts[..., None], target.to(logits.dtype), 0.0)
        losses = F.binary_cross_entropy_with_logits(logits, known, reduction="none").mean(-1)
        return losses * counts

    def counts(self, target: Tensor) -> Tensor:
        """Those of which no label is NaN."""
        return ~target.to(torch.float32).isnan().any(-1)


@dataclass(frozen=True)
class Regression:
    """Squared error, or Huber's (1964): squared up to `huber`, linear beyond. Prediction and target (...).

    Squares are whole, Huber's are halved (as PyTorch has both).
    """

    huber: float | None = None
    scale: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        if self.huber is not None and not self.huber > 0:
            raise AndromedaError(f"nebula: regression: huber={self.huber!r} must be positive")

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        _same(prediction.shape, target.shape, "prediction (...) and target (...)")
        prediction, counts = _wide(prediction), self.counts(target)
        target = torch.where(counts, target.to(prediction.dtype), prediction.detach())
        if self.huber is None:
            return F.mse_loss(prediction, target, reduction="none")
        return F.huber_loss(prediction, target, reduction="none", delta=self.huber)

    def counts(self, target: Tensor) -> Tensor:
        return ~target.isnan()


@dataclass(frozen=True)
class Distillation:
    """KL divergence between a teacher's distribution and the student's, at a temperature, times its square.

    Prediction and target: (..., V) logits of the student and of the teacher, or `Unprojected` both, of which a chunk is
    held at a time. Hinton et al. 2015; the reverse KL as in Gu et al. 2023.

    Attributes:
        reverse: KL(student || teacher), which keeps to the teacher's likeliest; else KL(teacher || student).
    """

    temperature: float = 1.0
    reverse: bool = False
    scale: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise AndromedaError(f"nebula: distillation: temperature={self.temperature!r} must be positive")

    def __call__(self, prediction: Tensor | Unprojected, target: Tensor | Unprojected) -> Tensor:
        if isinstance(prediction, Unprojected) and isinstance(target, Unprojected):
            return self._in_chunks(prediction, target)
        assert isinstance(prediction, Tensor) and isinstance(target, Tensor)
        return self._divergence(prediction, target)

    def counts(self, target: Tensor | Unprojected) -> Tensor:
        """All of them."""
        like = target.hidden if isinstance(target, Unprojected) else target
        return torch.ones(like.shape[:-1], dtype=torch.bool, device=like.device)

    def _divergence(self, prediction: Tensor, target: Tensor) -> Tensor:
        _same(prediction.shape, target.shape, "logits (..., V) of student and teacher")
        student, teacher = ((_wide(x) / self.temperature).log_softmax(-1) for x in (prediction, target.detach()))
        if self.reverse:
            student, teacher = teacher, student
        p = teacher.exp()
        return torch.where(p > 0, p * (teacher - student), 0.0).sum(-1) * self.temperature**2

    def _in_chunks(self, prediction: Unprojected, target: Unprojected) -> Tensor:
        _same(prediction.hidden.shape[:-1], target.hidden.shape[:-1], "hidden (..., dim) of student and teacher")

        def part(mine: Tensor, theirs: Tensor) -> Tensor:
            with torch.no_grad():
                teacher = F.linear(theirs, target.weight)
            return self._divergence(F.linear(mine, prediction.weight), teacher)

        rows = max(1, LOSS_CHUNK // len(prediction.weight))
        chunks = zip(*(x.hidden.reshape(-1, x.hidden.shape[-1]).split(rows) for x in (prediction, target)), strict=True)
        losses = [checkpoint(part, mine, theirs, use_reentrant=False) for mine, theirs in chunks]
        return torch.cat(losses).view(prediction.hidden.shape[:-1])


@dataclass(frozen=True)
class Preference:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7).

    Prediction and target: `Pair` of the model that learns and of the one it began as.

    Attributes:
        beta: how dear it is to leave the reference.
    """

    beta: float = 0.1
    scale: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise AndromedaError(f"nebula: preference: beta={self.beta!r} must be positive")

    def __call__(self, prediction: Pair, target: Pair) -> Tensor:
        for x in (prediction.rejected, target.chosen, target.rejected):
            _same(prediction.chosen.shape, x.shape, "log-probabilities of both answers of both models")
        return -F.logsigmoid(self.beta * self.margins(prediction, target))

    @staticmethod
    def margins(prediction: Pair, target: Pair) -> Tensor:
        """(N,) nats by which the model prefers the chosen answer more than the reference does."""
        learned, reference = (_wide(x.chosen) - _wide(x.rejected) for x in (prediction, target))
        return learned - reference.detach()

    def counts(self, target: Pair) -> Tensor:
        return torch.ones_like(target.chosen, dtype=torch.bool)


@dataclass(frozen=True)
class Contrastive:
    """InfoNCE (van den Oord et al. 2018), both ways as in CLIP: which of N rows belongs to which.

    Prediction and target (N, D), row i of one to row i of the other; their cosines over the temperature are the logits.
    """

    temperature: float = 0.07
    scale: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise AndromedaError(f"nebula: contrastive: temperature={self.temperature!r} must be positive")

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        _same(prediction.shape, target.shape, "prediction (N, D) and target (N, D)")
        a, b = (F.normalize(_wide(x), dim=-1) for x in (prediction, target))
        logits, own = a @ b.T / self.temperature, torch.arange(len(a), device=a.device)
        return (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")) / 2

    def counts(self, target: Tensor) -> Tensor:
        return torch.ones(len(target), dtype=torch.bool, device=target.device)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _same(one: torch.Size, other: torch.Size, what: str) -> None:
    if one != other:
        raise AndromedaError(f"nebula: {what} do not fit together: {tuple(one)} and {tuple(other)}")
