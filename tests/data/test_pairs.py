"""Pairs: what is read, what of it is learned, and which sequences hold it."""

from __future__ import annotations

import json
import runpy
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from andromeda.data.pairs import PADDING, PairSequences, check_pairs, encode_pair, load_pairs, read_pairs, split_files
from andromeda.errors import AndromedaError
from andromeda.model import IGNORED
from andromeda.tokenizer import Tokenizer

USER = {"role": "user", "content": "Which is larger?"}
TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Which is larger? The sun is larger than the moon. " * 4], 300)


def write(folder: Path, *records: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def texts(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{n} or {n + 1}?", "chosen": " " + "the second" * (1 + n % 3), "rejected": " no"}
        for n in range(count)
    ]


def learned(sequences: PairSequences, tokenizer: Tokenizer, pair: int) -> list[str]:
    """The targets of a pair's two answers, as text."""
    for batch in sequences.in_order(1):
        assert batch.documents is not None
        if (batch.documents == 2 * pair).any():
            answers = [batch.targets[batch.documents == 2 * pair + which] for which in (0, 1)]
            return [tokenizer.decode(x[x != IGNORED].tolist(), skip_special=False) for x in answers]
    raise AssertionError(f"pair {pair} is in no sequence")


def opened(path: Path, tokenizer: Tokenizer, seq_len: int = 128) -> PairSequences:
    store = load_pairs([path], tokenizer, path.parent / "store")
    return PairSequences(store, seq_len, seed=0, end_of_text=tokenizer.eos_id)


# ---- what is learned -----------------------------------------------------------------------------


def test_of_a_text_the_answer_and_its_end_are_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, {"prompt": "Which is larger?", "chosen": " The sun", "rejected": " The moon."})
    assert learned(opened(path, tokenizer), tokenizer, 0) == [" The sun<|endoftext|>", " The moon.<|endoftext|>"]


def test_of_messages_only_what_is_said_last_is_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prompt = [USER, said("the sun"), {"role": "user", "content": "Why?"}]
    path = write(tmp_path, {"prompt": prompt, "chosen": [said("It is.")], "rejected": [said("the moon")]})
    assert learned(opened(path, tokenizer), tokenizer, 0) == ["It is.<|im_end|>", "the moon<|im_end|>"]


def test_tools_and_calls_stand_in_the_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}
    path = write(tmp_path, {"prompt": [USER], "chosen": [call], "rejected": [said("no")], "tools": [TOOL]})
    chosen, rejected = learned(opened(path, tokenizer, 512), tokenizer, 0)
    assert chosen == '<tool_call>{"name": "look", "arguments": {}}</tool_call><|im_end|>' and rejected == "no<|im_end|>"
    (pair,) = read_pairs([path])
    assert '"name": "look"' in tokenizer.decode(list(encode_pair(pair, tokenizer)[1].ids), skip_special=False)


def test_a_prompt_may_be_what_both_answers_begin_with(tmp_path: Path, tokenizer: Tokenizer) -> None:
    both = [{"chosen": [USER, said("a"), USER, said("b")], "rejected": [USER, said("a"), USER, said("c")]}]
    (pair,) = read_pairs([write(tmp_path, *both)])
    assert [len(pair.prompt), len(pair.chosen), len(pair.rejected)] == [3, 1, 1]


# ---- sequences -----------------------------------------------------------------------------------


def test_an_epoch_has_each_pair_once_and_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sequences = opened(write(tmp_path, *texts(40)), tokenizer, 96)
    assert sequences.num_pairs == 40 and 1 < len(sequences) < 40
    in_order = torch.cat([torch.stack(batch[:3]) for batch in sequences.in_order(3)], 1)  # type: ignore[arg-type]
    orders = []
    for epoch in range(2):
        batch = sequences.batch(epoch * len(sequences), len(sequences))
        assert batch.documents is not None
        orders.append(batch.documents[:, 0].tolist())
        ids, targets, documents = batch
        for document in range(80):
            tokens = ids[documents == document].tolist()
            assert len(tokens) == sequences.store.lengths[document] and tokens[0] == tokenizer.eos_id
        assert sorted(orders[-1]) == sorted(in_order[2, :, 0].tolist())
        assert (targets[documents == PADDING] == IGNORED).all()
    assert orders[0] != orders[1]
    assert torch.equal(sequences.batch(3, 2).ids, sequences.batch(0, 9).ids[3:5])


def test_rejected_answers_stand_in_the_second_half_in_the_order_of_the_chosen(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for batch in opened(write(tmp_path, *texts(20)), tokenizer, 96).in_order(1):
        assert batch.documents is not None
        chosen, rejected = (half.unique_consecutive() for half in batch.documents[0].split(96))
        chosen, rejected = chosen[chosen != PADDING], rejected[rejected != PADDING]
        assert (chosen % 2 == 0).all() and torch.equal(chosen + 1, rejected)


def test_pairs_that_are_too_long_are_told_of(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, *texts(3), {"prompt": "x" * 200, "chosen": "a", "rejected": "b"})
    sequences = opened(path, tokenizer, 96)
    assert sequences.too_long.tolist() == [3]
    assert sequences.store.where(6).endswith("pairs.jsonl:4")
    with pytest.raises(AndromedaError, match=r"pairs\.jsonl:1: an answer of this pair has \d+ tokens, .* seq_len=8"):
        opened(path, tokenizer, 8)


def test_what_is_kept_is_used_again_until_the_pairs_change(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, *texts(2))
    first = load_pairs([path], tokenizer, tmp_path / "store")
    written = (tmp_path / "store" / "documents.npy").stat().st_mtime_ns
    assert load_pairs([path], tokenizer, tmp_path / "store").facts == first.facts
    assert (tmp_path / "store" / "documents.npy").stat().st_mtime_ns == written
    other = load_pairs([write(tmp_path, *texts(3))], tokenizer, tmp_path / "store")
    assert other.facts["key"] != first.facts["key"] and len(other) == 6
    (tmp_path / "store" / "tokens-00000.bin").write_bytes(b"")
    assert np.array_equal(load_pairs([path], tokenizer, tmp_path / "store").lengths, other.lengths)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "rejected": "b"}, "has no `chosen`"),
        ({"prompt": "a", "chosen": "b"}, "has no `rejected`"),
        ({"text": "a"}, "has no `chosen`"),
        ({"chosen": "b", "rejected": "c"}, "must all be texts, or all lists of messages"),
        ({"prompt": "a", "chosen": [USER], "rejected": [said("b")]}, "must all be texts, or all lists of messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same, so nothing is preferred"),
        ({"chosen": [said("a")], "rejected": [said("b")]}, "do not begin with one and then differ"),
        ({"prompt": [USER], "chosen": [{"role": "x"}], "rejected": [said("b")]}, "a message's role is 'x'"),
        ({"prompt": "a", "chosen": "\ud800", "rejected": "b"}, "not valid Unicode"),
        ([1], "is a list; it must be an object"),
    ],
)
def test_no_pair(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(AndromedaError, match=rf"pairs\.jsonl:1: .*{message}"):
        check_pairs([write(tmp_path, record)])


def test_no_file_of_pairs(tmp_path: Path) -> None:
    with pytest.raises(AndromedaError, match="no pair; name files that hold some"):
        check_pairs([write(tmp_path)])
    with pytest.raises(AndromedaError, match=r"none\.jsonl: no such file"):
        check_pairs([tmp_path / "none.jsonl"])
    with pytest.raises(AndromedaError, match=r"pairs\.txt: unknown kind of file"):
        check_pairs([tmp_path / "pairs.txt"])


def test_answers_in_which_the_assistant_says_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, {"prompt": [USER], "chosen": [USER], "rejected": [said("b")]})
    with pytest.raises(AndromedaError, match=r"pairs\.jsonl:1: in an answer the assistant says nothing"):
        load_pairs([path], tokenizer, tmp_path / "store")


def test_the_examples_are_what_their_script_makes() -> None:
    folder = Path(__file__).parents[2] / "examples" / "preferences"
    script = runpy.run_path(str(folder / "build.py"))
    for name, (split, number) in script["FILES"].items():
        path = folder / name
        made = [json.dumps(pair) for pair in islice(script["pairs"](split), number)]
        assert made == path.read_text(encoding="utf-8").splitlines()
        assert len(list(read_pairs([path]))) == number


def test_files_are_told_apart_by_their_first_record(tmp_path: Path) -> None:
    records = {"text": {"text": "a"}, "pair": {"prompt": "a", "chosen": "b", "rejected": "c"}, "half": {"chosen": "b"}}
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in (*records, "none")}
    for name, record in records.items():
        Path(paths[name]).write_text(json.dumps(record) + "\n")
    others = ["a.txt", "b.md.xz", "c.parquet"]
    assert split_files([*paths.values(), *others]) == (
        [paths["text"], paths["none"], "a.txt", "b.md.xz"], [paths["pair"], paths["half"], "c.parquet"],
    )  # fmt: skip
    Path(paths["text"]).write_text("{")
    with pytest.raises(AndromedaError, match=r"text\.jsonl:1"):
        split_files([paths["text"]])
