"""Random JSON schemas x random weights: what a model writes under a grammar keeps to the schema."""

from __future__ import annotations

import json
from decimal import Decimal, localcontext
from functools import cache

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, reject, settings
from hypothesis import strategies as st

from andromeda.cache import Cache
from andromeda.config import preset
from andromeda.errors import AndromedaError
from andromeda.inference.grammar import Grammar, Grammars
from andromeda.inference.sampling import Sampling, sample
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer
from tests.inference.schemas import Schema, schemas

TEXTS = [
    '{"name": "get_weather", "arguments": {"city": "Zoë", "days": [1, 2, 3], "at": null, "ok": true}}\n' * 3,
    '[{"a": -1.5e3, "b": "日本語 🙂"}, {"a": 0.25, "b": "x, y: z"}]\n' * 3,
    "The sea, the sea! naïve café\n" * 3,
]
TOKENIZER = Tokenizer.train(TEXTS, 400)
GRAMMARS = Grammars(TOKENIZER)
MAX_TOKENS = 120


@cache
def model(seed: int) -> Andromeda:
    """Random weights, with more ids than the tokenizer has."""
    torch.manual_seed(seed)
    return Andromeda(
        preset("nano", num_tokens=TOKENIZER.vocab_size + 45, dim=32, depth=1, heads=2, alibi_num_heads=1, dim_head=16)
    ).eval()


@torch.inference_mode()
def written(grammar: Grammar, seed: int, limit: int = MAX_TOKENS) -> list[int]:
    """A plain loop: tokens that are forced as they stand, others drawn from what the mask leaves."""
    constraint, cache, generator = grammar.constraint(), Cache(), torch.Generator().manual_seed(seed)
    decoder = model(seed % 3)
    row = np.empty(-(-decoder.config.num_tokens // 32), dtype=np.int32)
    ids: list[int] = []
    unread = [TOKENIZER.eos_id]
    while len(ids) < limit and not (ids and ids[-1] in TOKENIZER.stop_ids):
        new = constraint.forced()
        if not new:
            constraint.fill_mask(row)
            logits = decoder(torch.tensor([unread]), cache=cache)[:, -1]
            allowed = np.unpackbits(row.view(np.uint8), bitorder="little")[: logits.shape[1]].astype(bool)
            new, unread = (
                [int(sample(logits.masked_fill(~torch.from_numpy(allowed), -torch.inf), Sampling(), generator))],
                [],
            )
        assert constraint.advance(new) == len(new)
        ids, unread = ids + new, unread + new
    return ids


def with_exact_numbers(text: str):
    """Fractions as decimals; what has an exponent as a float, for exponents have no bound."""
    return json.loads(text, parse_float=lambda number: float(number) if "e" in number.lower() else Decimal(number))


def keeps_to(schema: Schema, text: str) -> None:
    draft = jsonschema.Draft202012Validator
    validator = draft(with_exact_numbers(json.dumps(schema)), format_checker=draft.FORMAT_CHECKER)
    with localcontext(prec=1000):
        validator.validate(with_exact_numbers(text))


def check(schema: Schema, seed: int) -> None:
    try:
        grammar = GRAMMARS.json_schema(schema)
    except AndromedaError as error:
        event(f"refused: {str(error)[:70]}")
        reject()
    ids = written(grammar, seed)
    assert all(token < TOKENIZER.vocab_size for token in ids)
    if ids[-1] in TOKENIZER.stop_ids:
        event("finished")
        assert not TOKENIZER.control_ids & set(ids[:-1])
        keeps_to(schema, TOKENIZER.decode(ids))
    else:
        event("cut off")
        assert not TOKENIZER.control_ids & set(ids)
        assert grammar.constraint().advance(ids) == len(ids)


@settings(max_examples=40)
@given(schemas(), st.integers(0, 2**32))
def test_what_is_written_keeps_to_the_schema(schema, seed):
    check(schema, seed)


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(schemas(), st.integers(0, 2**32))
def test_what_is_written_keeps_to_any_of_a_thousand_schemas(schema, seed):
    check(schema, seed)
