"""DPO on pairs: its loss against the formula on logits, its figures, and any number of processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.commands.reference import compare
from andromeda.commands.start import Start
from andromeda.data.pairs import PairSequences, load_pairs
from andromeda.data.windows import Batch
from andromeda.model import IGNORED, Andromeda
from andromeda.tokenizer import Tokenizer
from andromeda.training.engines import build_engine
from andromeda.training.loop import Loop, Outside
from andromeda.training.metrics import Meter
from andromeda.training.objective import NextToken
from andromeda.training.preference import (
    Preferences,
    Reference,
    held_out_figures,
    load_reference,
    reference_log_probabilities,
    save_reference,
)
from andromeda.training.progress import Silent
from andromeda.training.recipe import DataRecipe, Recipe
from andromeda.training.state import TrainingState
from andromeda.training.steps import ENDLESS, Steps
from tests.ranks import Ranks
from tests.training.conftest import TINY
from tests.training.kept import CPU, processes_of

BETA, SEQ_LEN = 0.5, 40
KEYS: dict[str, Any] = {
    "steps": 4, "batch_size": 1, "accumulate": 3, "warmup_steps": 1, "learning_rate": 0.01, "log_every": 1,
    "validate_every": 2, "dpo_beta": BETA,
}  # fmt: skip


class Small(PairSequences):
    """With token ids of the tiny model."""

    def _stacked(self, places: Sequence[int]) -> Batch:
        ids, targets, documents = super()._stacked(places)
        return Batch(ids % 64, torch.where(targets == IGNORED, IGNORED, targets % 64), documents)


def sequences(folder: Path, count: int = 11) -> PairSequences:
    """Eleven pairs, in four double sequences or so."""
    records = [
        {"prompt": "1+" * (1 + n % 4), "chosen": "=" * (2 + n % 3), "rejected": "?" * (1 + n % 5)} for n in range(count)
    ]
    path = folder / f"{count}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = Tokenizer.train(["a"], 266)
    store = load_pairs([path], tokenizer, folder / f"store-{count}")
    return Small(store, SEQ_LEN, seed=0, end_of_text=tokenizer.eos_id)


def models() -> tuple[Andromeda, Andromeda]:
    torch.manual_seed(0)
    reference = Andromeda(TINY)
    learned = Andromeda(TINY)
    return learned, reference


def by_hand(model: Andromeda, batch: Any) -> Tensor:
    """(P, 2) by the pair's number: each answer in a pass of its own, from all logits, in float64."""
    ids, targets, documents = batch
    assert documents is not None
    found: dict[int, float] = {}
    for document in documents.unique().tolist():
        if document >= 0:
            alone = documents == document
            logits = model.double()(ids[alone][None])
            losses = F.cross_entropy(logits[0], targets[alone], ignore_index=IGNORED, reduction="sum")
            found[document] = -losses.item()
    return torch.tensor([[found[d], found[d + 1]] for d in found if d % 2 == 0], dtype=torch.float64)


def test_losses_and_figures_are_those_of_the_formula(tmp_path: Path) -> None:
    pairs, (learned, reference) = sequences(tmp_path), models()
    objective = Preferences(learned, CPU, torch.float32, BETA)
    before = NextToken(reference, CPU)
    batches = list(pairs.in_order(2))
    objective.reference = reference_log_probabilities(before, batches, pairs.num_pairs)
    assert sum(map(objective.count, batches)) == 11
    results, expected = [], []
    for batch in batches:
        assert batch.documents is not None
        chosen = batch.documents[batch.documents % 2 == 0].unique_consecutive()  # in the order of the sequence
        results.append(objective(batch)[chosen.argsort()])
        ratios = by_hand(learned, batch) - by_hand(reference, batch)
        margins = BETA * (ratios[:, 0] - ratios[:, 1])
        learned.float()
        reference.float()
        expected.append(torch.stack([-F.logsigmoid(margins), margins, (margins > 0).double()], 1))
    torch.testing.assert_close(torch.cat(results).detach(), torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert 0 < torch.cat(expected)[:, 2].mean() < 1

    learned_of = reference_log_probabilities(NextToken(learned, CPU), batches, pairs.num_pairs)
    figures = held_out_figures(objective.loss, learned_of, objective.reference)
    assert list(figures) == ["validation_loss", "validation_reward_margin", "validation_reward_accuracy"]
    assert list(figures.values()) == pytest.approx(torch.cat(expected).mean(0).tolist(), abs=1e-5)


def test_the_model_beside_itself_has_no_margin(tmp_path: Path) -> None:
    pairs, (model, _) = sequences(tmp_path), models()
    objective = Preferences(model, CPU, torch.float32, BETA)
    objective.eval()
    objective.reference = reference_log_probabilities(objective, pairs.in_order(2), pairs.num_pairs)
    objective.train()
    losses = objective(pairs.batch(0, len(pairs)))
    torch.testing.assert_close(losses[:, 0], torch.full((11,), 2.0).log().double(), rtol=0, atol=1e-6)
    assert losses[:, 1].abs().max() < 1e-5
    losses.sum(0)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) > 0


def test_in_evaluation_text_costs_what_it_costs(model: Andromeda) -> None:
    batch = (torch.arange(16)[None], torch.arange(1, 17)[None], None)
    objective = Preferences(model, CPU, torch.float32, BETA)
    objective.eval()
    assert torch.equal(objective(batch), NextToken(model, CPU)(batch))


def test_a_batch_of_no_pair_has_a_gradient_of_zero(model: Andromeda) -> None:
    objective = Preferences(model, CPU, torch.float32, BETA)
    batch = (torch.zeros(1, 32, dtype=torch.int64), torch.full((1, 32), IGNORED), None)
    assert objective.count(batch) == 0
    losses = objective(batch)
    assert losses.shape == (0, 3)
    losses.sum(0)[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_reference_is_kept(tmp_path: Path) -> None:
    assert load_reference(tmp_path) is None
    trained_on, held_out = (torch.randn(n, 2, dtype=torch.float64) for n in (5, 3))
    for reference in (Reference(trained_on), Reference(trained_on, held_out, "abc")):
        save_reference(tmp_path, reference)
        kept = load_reference(tmp_path)
        assert kept is not None and torch.equal(kept.trained_on, trained_on)
        assert kept.held_out_key == reference.held_out_key
        assert (kept.held_out is None) == (reference.held_out is None)
        assert kept.held_out is None or torch.equal(kept.held_out, held_out)


# ---- processes -----------------------------------------------------------------------------------


def run(group: Any, engine: str, folder: str) -> list[dict[str, Any]]:
    """Measures the reference and trains; the lines of metrics."""
    processes = processes_of(group)
    data = DataRecipe(pairs="pairs.jsonl")
    recipe = Recipe(data=data, model={"from": "runs/a"}, engine=engine, **KEYS)  # type: ignore[arg-type]
    with processes.first_alone():
        pairs, held_out = sequences(Path(folder)), sequences(Path(folder), 5)
    model = models()[0]
    built = build_engine(recipe, model, processes)
    compared = compare(built, pairs, held_out, Start(model, Tokenizer.train(["a"], 266), TrainingState()))
    state, lines = TrainingState(), list[dict[str, Any]]()
    steps = Steps((ENDLESS,), (2 * SEQ_LEN,), recipe.batch_size, recipe.accumulate)
    outside = Outside(
        pairs.batch, lambda: compared.validate(built), lambda _: None, lines.append, lambda: False, lambda: False,
        lambda _: None,
    )  # fmt: skip
    Loop(recipe, built, state, steps, Meter(1.0, float, 1.0), outside).run(Silent())
    return lines


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp", "zero3"])
def test_two_processes_train_as_one_does(engine: str, ranks: Ranks, tmp_path: Path) -> None:
    """Three double sequences a step: shares do not divide, so that one process computes on nothing."""
    expected = run(None, "ddp", str(tmp_path))
    assert expected[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and expected[-1]["loss"] < 0.68
    assert expected[-1]["reward_accuracy"] > 0.6 and expected[-1]["reward_margin"] > 0.01
    assert "train_bits_per_byte" not in expected[0]
    assert expected[-1]["validation_loss"] < expected[1]["validation_loss"] < 0.6931
    for lines in ranks(run, 2, engine, str(tmp_path)):
        for line, exact in zip(lines, expected, strict=True):
            assert line.keys() == exact.keys() and ("validation_loss" in line) == (line["step"] % 2 == 0)
            figures = [key for key in line if "reward" in key or "validation" in key]
            for key in ("step", "tokens", "loss", "gradient_norm", *figures):
                assert line[key] == pytest.approx(exact[key], rel=1e-4, abs=2e-6), key
