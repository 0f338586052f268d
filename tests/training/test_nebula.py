"""The Nebula loss: every kind against its formula in float64, every balance on a problem with a known answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.model import IGNORED
from andromeda.training.nebula import (
    FAMO,
    LOSSES,
    Classification,
    Contrastive,
    Distillation,
    Given,
    LanguageModel,
    MultiLabel,
    Nebula,
    Pair,
    Preference,
    Regression,
    Task,
    Uncertainty,
    Unprojected,
    losses,
)
from andromeda.training.nebula.kinds import fitting_kinds


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def learning(*shape: int) -> Tensor:
    return normal(*shape).requires_grad_()


def whole(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


class TestFormulas:
    """Written out, with loops where that is plainest."""

    @pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 0.1)])
    def test_language_model(self, smoothing: float, z_loss: float) -> None:
        hidden, weight, target = learning(2, 3, 4), learning(7, 4), whole(7, 2, 3)
        target[1, 2] = IGNORED
        found = LanguageModel(smoothing, z_loss)(Unprojected(hidden, weight), target)
        for b in range(2):
            for t in range(3):
                p = torch.softmax(weight @ hidden[b, t], 0)
                log_z = torch.exp(weight @ hidden[b, t]).sum().log()
                wanted = torch.full((7,), smoothing / 7, dtype=torch.float64)
                wanted[target[b, t] % 7] += 1 - smoothing
                exact = -(wanted * p.log()).sum() + z_loss * log_z**2
                torch.testing.assert_close(found[b, t], exact if (b, t) != (1, 2) else exact * 0)
        assert LanguageModel().counts(target).sum() == 5
        assert torch.autograd.gradcheck(
            lambda h, w: LanguageModel(smoothing, z_loss)(Unprojected(h, w), target), (hidden, weight)
        )

    def test_classification(self) -> None:
        logits, target = learning(5, 3), whole(3, 5)
        target[2] = IGNORED
        found = Classification()(logits, target)
        for i in range(5):
            exact = (
                -math.log(math.exp(logits[i, target[i]].item()) / sum(math.exp(x) for x in logits[i].tolist()))
                if i != 2
                else 0.0
            )
            assert found[i].item() == pytest.approx(exact)
        assert torch.autograd.gradcheck(lambda x: Classification(0.1)(x, target), logits)

    def test_multi_label(self) -> None:
        logits, target = learning(4, 3), whole(2, 4, 3).bool()
        found = MultiLabel()(logits, target)
        for i in range(4):
            terms = [
                -math.log(1 / (1 + math.exp(-x if y else x)))
                for x, y in zip(logits[i].tolist(), target[i], strict=True)
            ]
            assert found[i].item() == pytest.approx(sum(terms) / 3)
        assert torch.autograd.gradcheck(lambda x: MultiLabel()(x, target), logits)

    def test_regression(self) -> None:
        x, y = learning(6), normal(6)
        torch.testing.assert_close(Regression()(x, y), (x - y) ** 2)
        found = Regression(huber=0.5)(x, y)
        for i in range(6):
            gap = abs(x[i] - y[i]).item()
            assert found[i].item() == pytest.approx(gap**2 / 2 if gap <= 0.5 else 0.5 * (gap - 0.25))
        assert torch.autograd.gradcheck(lambda x: Regression(huber=0.5)(x, y), x)

    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    @pytest.mark.parametrize("reverse", [False, True])
    def test_distillation(self, reverse: bool, temperature: float) -> None:
        student, teacher = learning(3, 5), normal(3, 5)
        loss = Distillation(temperature, reverse)
        found = loss(student, teacher)
        for i in range(3):
            p, q = (torch.softmax(x[i] / temperature, 0) for x in (teacher, student))
            p, q = (q, p) if reverse else (p, q)
            assert found[i].item() == pytest.approx((p * (p / q).log()).sum().item() * temperature**2)
        assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student)
        assert loss(teacher, teacher).abs().max() < 1e-12

    def test_distillation_of_words_that_the_teacher_rules_out(self) -> None:
        student, teacher = learning(2, 3), normal(2, 3)
        teacher[:, 1] = -math.inf
        (gradient,) = torch.autograd.grad(Distillation()(student, teacher).sum(), student)
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("reverse", [False, True])
    def test_distillation_without_the_logits(self, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(losses, "LOSS_CHUNK", 3 * 7)
        made: list[int] = []
        plain = F.linear

        def linear(x: Tensor, weight: Tensor) -> Tensor:
            made.append(len(x))
            return plain(x, weight)

        monkeypatch.setattr(F, "linear", linear)
        student, teacher = Unprojected(learning(2, 5, 4), learning(7, 4)), Unprojected(normal(2, 5, 6), normal(7, 6))
        found = Distillation(2.0, reverse)(student, teacher)
        gradients = torch.autograd.grad(found.sum(), (student.hidden, student.weight))
        assert max(made) == 3
        exact = Distillation(2.0, reverse)(student.hidden @ student.weight.T, teacher.hidden @ teacher.weight.T)
        torch.testing.assert_close(found, exact)
        for a, b in zip(gradients, torch.autograd.grad(exact.sum(), (student.hidden, student.weight)), strict=True):
            torch.testing.assert_close(a, b)

    def test_preference(self) -> None:
        policy, reference = Pair(learning(4), learning(4)), Pair(normal(4), normal(4))
        found = Preference(beta=0.3)(policy, reference)
        for i in range(4):
            ratio = (policy.chosen - reference.chosen)[i] - (policy.rejected - reference.rejected)[i]
            assert found[i].item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.3 * ratio))))
        assert torch.autograd.gradcheck(
            lambda c, r: Preference()(Pair(c, r), reference), (policy.chosen, policy.rejected)
        )
        assert Preference()(reference, reference).allclose(torch.tensor(math.log(2), dtype=torch.float64))

    def test_contrastive(self) -> None:
        a, b = learning(4, 3), learning(4, 3)
        found = Contrastive(0.5)(a, b)
        cosine = torch.tensor([[F.cosine_similarity(x, y, 0) for y in b] for x in a], dtype=torch.float64) / 0.5
        for i in range(4):
            one = -math.log(math.exp(cosine[i, i]) / sum(math.exp(x) for x in cosine[i]))
            two = -math.log(math.exp(cosine[i, i]) / sum(math.exp(x) for x in cosine[:, i]))
            assert found[i].item() == pytest.approx((one + two) / 2)
        assert torch.autograd.gradcheck(Contrastive(0.5), (a, b))

    def test_targets_that_are_missing_count_nothing(self) -> None:
        x, y = learning(4), normal(4)
        y[1] = math.nan
        logits, labels = learning(4, 2), torch.tensor([[1.0, 0], [math.nan, 0], [0, 0], [1, 1]])
        for loss, prediction, target in ((Regression(), x, y), (Regression(1.0), x, y), (MultiLabel(), logits, labels)):
            found = loss(prediction, target)
            assert loss.counts(target).tolist() == [True, False, True, True]
            assert found[1] == 0
            (gradient,) = torch.autograd.grad(found.sum(), prediction)
            assert gradient.isfinite().all() and (gradient[1] == 0).all()

    @pytest.mark.parametrize(
        ("loss", "prediction", "target"),
        [
            (Regression(), normal(4, 1), normal(4)),
            (MultiLabel(), normal(4, 3), normal(4, 1)),
            (Classification(), normal(4, 3), whole(3, 3)),
            (Distillation(), normal(4, 3), normal(4, 2)),
            (Contrastive(), normal(4, 3), normal(3, 3)),
            (Preference(), Pair(normal(4), normal(4)), Pair(normal(4), normal(1))),
            (LanguageModel(), Unprojected(normal(2, 3, 4), normal(7, 4)), whole(7, 3, 2)),
        ],
    )
    def test_shapes_are_never_stretched(self, loss: Any, prediction: Any, target: Any) -> None:
        with pytest.raises(AndromedaError, match="do not fit together"):
            loss(prediction, target)

    @pytest.mark.parametrize(
        ("make", "key"),
        [
            (lambda: Regression(huber=0.0), "huber"),
            (lambda: Distillation(temperature=0), "temperature"),
            (lambda: Preference(beta=-1), "beta"),
            (lambda: Contrastive(temperature=math.nan), "temperature"),
            (lambda: Task(weight=-1), "weight"),
        ],
    )
    def test_values_out_of_range(self, make: Callable[[], object], key: str) -> None:
        with pytest.raises(AndromedaError, match=key):
            make()


class TestKinds:
    @pytest.mark.parametrize(
        ("prediction", "target", "kind"),
        [
            (Unprojected(normal(2, 3, 4), normal(7, 4)), whole(7, 2, 3), "language_model"),
            (Unprojected(normal(2, 3, 4), normal(7, 4)), Unprojected(normal(2, 3, 6), normal(7, 6)), "distillation"),
            (normal(5, 3), whole(3, 5), "classification"),
            (normal(2, 5, 3), whole(3, 2, 5), "classification"),
            (normal(5, 3), whole(2, 5, 3).bool(), "multi_label"),
            (normal(5), normal(5), "regression"),
            (normal(5, 1), normal(5, 1), "regression"),
            (Pair(normal(3), normal(3)), Pair(normal(3), normal(3)), "preference"),
        ],
    )
    def test_found_where_only_one_fits(self, prediction: Any, target: Any, kind: str) -> None:
        assert fitting_kinds(prediction, target) == [kind]
        nebula = Nebula({"task": Task()})
        expected = LOSSES[kind]()(prediction, target).mean()  # type: ignore[index]
        torch.testing.assert_close(nebula({"task": Given(prediction, target)}).loss, expected)

    def test_ambiguity_names_the_choices(self) -> None:
        with pytest.raises(
            AndromedaError,
            match=r"task 'value'.*float64 \(5, 3\).*regression, multi_label, "
            r"distillation or contrastive; state its kind",
        ):
            Nebula({"value": Task()})({"value": Given(normal(5, 3), normal(5, 3))})
        with pytest.raises(AndromedaError, match="regression, multi_label or distillation; state"):
            Nebula({"value": Task()})({"value": Given(normal(2, 5, 3), normal(2, 5, 3))})

    @pytest.mark.parametrize(
        ("prediction", "target"),
        [(normal(5, 3), normal(4, 3)), (whole(3, 5), whole(3, 5)), (normal(5), "cat"), (normal(3), whole(3, 3)),
         (Unprojected(normal(2, 4), normal(7, 4)), normal(2)), (Pair(normal(2), normal(2)), normal(2))],
    )  # fmt: skip
    def test_what_fits_none(self, prediction: Any, target: Any) -> None:
        with pytest.raises(AndromedaError, match="fits no kind of loss; kinds: language_model, "):
            Nebula({"task": Task()})({"task": Given(prediction, target)})


class TestSum:
    @staticmethod
    def batch(size: int) -> dict[str, Given]:
        return {
            "class": Given(learning(size, 3), whole(3, size), torch.rand(size, dtype=torch.float64)),
            "value": Given(learning(size), normal(size)),
        }

    @staticmethod
    def part(batch: dict[str, Given], at: slice) -> dict[str, Given]:
        return {
            name: Given(x.prediction[at], x.target[at], None if x.weights is None else x.weights[at])
            for name, x in batch.items()
        }

    def test_is_the_weighted_sum_of_weighted_means(self) -> None:
        batch = self.batch(6)
        total = Nebula({"class": Task(weight=2.0), "value": Task()})(batch)
        a, b = batch["class"], batch["value"]
        assert a.weights is not None
        mean = (F.cross_entropy(a.prediction, a.target, reduction="none") * a.weights).sum() / a.weights.sum()
        torch.testing.assert_close(total.loss, 2 * mean + F.mse_loss(b.prediction, b.target))
        torch.testing.assert_close(total.means, torch.stack([mean, F.mse_loss(b.prediction, b.target)]).detach())

    @pytest.mark.parametrize("balance", ["fixed", "uncertainty", "famo"])
    @given(cut=st.integers(0, 7))
    def test_of_parts_is_that_of_the_whole(self, balance: Any, cut: int) -> None:
        torch.manual_seed(cut)
        batch = self.batch(7)
        nebula = Nebula({"class": Task(), "value": Task(weight=0.5)}, balance)
        counts = nebula.count(batch)
        whole_one = nebula(batch).loss
        parts = [self.part(batch, slice(0, cut)), self.part(batch, slice(cut, 7))]
        found = sum(nebula(part, counts, share).loss for part, share in zip(parts, (0.25, 0.75), strict=True))
        torch.testing.assert_close(found, whole_one)

    def test_a_task_may_be_absent(self) -> None:
        batch = self.batch(4)
        nebula = Nebula({"class": Task(Classification()), "value": Task(Regression())})
        total = nebula({"value": batch["value"]})
        torch.testing.assert_close(total.loss, F.mse_loss(batch["value"].prediction, batch["value"].target))
        assert total.means[0].isnan()

    def test_a_batch_without_any_target_is_no_nan(self) -> None:
        logits = learning(3, 2)
        loss = Nebula({"class": Task()})({"class": Given(logits, torch.full((3,), IGNORED))}).loss
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and (gradient == 0).all()

    def test_what_is_wrong_is_named(self) -> None:
        nebula = Nebula({"class": Task(Classification())})
        with pytest.raises(AndromedaError, match="no task 'klass'; tasks: class"):
            nebula({"klass": Given(normal(2, 2), whole(2, 2))})
        with pytest.raises(AndromedaError, match=r"task 'class': .*\(2,\) and \(3,\)"):
            nebula({"class": Given(normal(2, 2), whole(2, 3))})
        with pytest.raises(AndromedaError, match="there is no task"):
            Nebula({})
        with pytest.raises(AndromedaError, match=r"task 'class': weights \(3,\) of losses \(2,\)"):
            nebula({"class": Given(normal(2, 2), whole(2, 2), torch.ones(3))})


class TestBalance:
    def test_uncertainty_finds_the_noise(self) -> None:
        """Of losses that stay, the coefficients' optimum is known: scale * L = sigma^2 / 2."""
        x = learning(1000)
        nebula = Nebula({"a": Task(Regression()), "b": Task(Regression())}, "uncertainty")
        given_ = {"a": Given(x, x.detach() + 0.5), "b": Given(x, x.detach() - 3.0)}
        optimizer = torch.optim.Adam(nebula.parameters(), lr=0.05)
        for _ in range(600):
            optimizer.zero_grad()
            nebula(given_).loss.backward()
            optimizer.step()
        assert isinstance(nebula.balance, Uncertainty)
        assert nebula.balance.log_variance.exp().tolist() == pytest.approx([0.25, 9.0], rel=1e-3)
        assert nebula.balance.coefficients().tolist() == pytest.approx([1 / (2 * 0.25), 1 / (2 * 9.0)], rel=1e-3)

    def test_uncertainty_of_a_class_counts_twice_that_of_a_number(self) -> None:
        nebula = Nebula({"class": Task(Classification()), "value": Task(Regression())}, "uncertainty")
        assert nebula.balance.coefficients().tolist() == [1.0, 0.5]

    def test_famo_is_the_papers_first_step(self) -> None:
        balance = FAMO([1.0, 1.0, 1.0], [1.0] * 3)
        balance.observe(torch.tensor([2.0, 2.0, 2.0]), torch.tensor([1.0, 1.5, 2.0]))
        assert balance.xi.tolist() == pytest.approx([-0.025, 0.025, 0.025], rel=1e-3), "Adam's first step"
        shares = torch.softmax(balance.xi, 0) / torch.tensor([1.0, 1.5, 2.0])
        torch.testing.assert_close(balance.coefficients(), shares / shares.sum())

    @staticmethod
    def after(balance: Any, steps: int = 400) -> tuple[float, float]:
        """How far the logarithms of two losses fall that pull a number to 1, 100 times as hard, and to -1."""
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)

        def both() -> list[Tensor]:
            return [100 * ((x - 1) ** 2 + 0.5), (x + 1) ** 2 + 0.5]

        begin = [value.item() for value in both()]
        nebula = Nebula({"a": Task(Regression()), "b": Task(Regression())}, balance)
        optimizer = torch.optim.Adam([x], lr=0.02)
        for _ in range(steps):
            before = torch.cat(both())
            optimizer.zero_grad()
            (nebula.balance.coefficients() * before).sum().backward()
            optimizer.step()
            with torch.no_grad():
                nebula.balance.observe(before.detach().float(), torch.cat(both()).float())
        a, b = (math.log(old / new.item()) for old, new in zip(begin, both(), strict=True))
        return a, b

    def test_famo_lets_all_fall_alike(self) -> None:
        """A compromise of equals is at 0: with fixed weights the loud task has it nearly all its own way."""
        a, b = self.after("fixed")
        assert a > 0.9 and b < -0.9
        a, b = self.after("famo")
        assert abs(a - b) < 0.2

    @pytest.mark.parametrize("balance", ["uncertainty", "famo"])
    def test_what_it_learned_is_its_state(self, balance: Any) -> None:
        tasks = {"a": Task(Regression()), "b": Task(Regression())}
        one, other = Nebula(tasks, balance), Nebula(tasks, balance)
        with torch.no_grad():
            for p in one.parameters():
                p.add_(0.3)
        for k in range(3):
            one.balance.observe(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.9 - k / 10]))
        other.load_state_dict(one.state_dict())
        for nebula in (one, other):
            nebula.balance.observe(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        assert torch.equal(one.balance.coefficients(), other.balance.coefficients())
        assert not torch.equal(one.balance.coefficients(), Nebula(tasks, balance).balance.coefficients())
