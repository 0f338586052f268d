"""Every task: from the number alone, the same everywhere, with a span that counts and an answer that passes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from andromeda.chat import default_chat_template
from andromeda.data.synthetic import SPLITS, TASKS, Chat, Sample, Task, Text, check, make_task, sample
from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer

DIGESTS = """
arithmetic b6093e7d5800
word_problems 8380a6b200c1
tool_calls 67e0ff266816
passkey af5227020126
needles fe464bd75eea
recall 9b73f747d113
copying f0eea0a074a5
variables d0ad65e48525
verse_form 2ea3cde5a208
"""


def plain(drawn: Sample) -> str:
    """All of a sample, as JSON."""
    body = drawn.body
    shown = [body.text, body.span] if isinstance(body, Text) else [body.messages, body.tools]
    return json.dumps(
        [shown, drawn.answer, drawn.content, drawn.task.parameters(), drawn.split, drawn.seed, drawn.number]
    )


def digest(task: Task) -> str:
    samples = [sample(task, split, 3, number) for split in SPLITS for number in (0, 1, 1000)]
    return hashlib.sha256("\n".join(map(plain, samples)).encode()).hexdigest()[:12]


def digests() -> str:
    return "\n".join(f"{name} {digest(make_task(name))}" for name in TASKS)


def said(drawn: Sample) -> str:
    """What is to be answered, as a model would write it."""
    if isinstance(drawn.body, Text):
        return drawn.body.completion
    return drawn.body.messages[-1]["content"] or drawn.answer


def any_poem(task: Task) -> bool:
    """Whether hardly anything is asked of it, but for a word and a number of lines."""
    return task.name == "verse_form" and task.parameters() == make_task("verse_form", count="nothing").parameters()


def test_samples_are_the_same_on_every_machine_and_in_every_version() -> None:
    assert digests() == DIGESTS.strip()


def test_another_process_with_another_hash_seed_draws_the_same() -> None:
    script = f"import runpy; print(runpy.run_path({str(Path(__file__))!r})['digests']())"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == digests()


def test_a_sample_follows_from_its_number_alone(task: Task) -> None:
    forwards = [plain(sample(task, "train", 0, number)) for number in range(8)]
    backwards = [plain(sample(task, "train", 0, number)) for number in reversed(range(8))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == 8
    assert plain(sample(replace(task), "train", 0, 5)) == forwards[5]


def test_seeds_and_splits_draw_different_samples(task: Task) -> None:
    drawn = [[plain(sample(task, split, seed, n)) for n in range(5)] for split in SPLITS for seed in (0, 1)]
    texts = {json.dumps(json.loads(text)[:3]) for several in drawn for text in several}
    assert len(texts) > 17  # one-digit sums and the like may come twice


def test_the_answer_passes_and_others_do_not(task: Task) -> None:
    drawn = [sample(task, split, 0, number) for split in SPLITS for number in range(15)]
    for one in drawn:
        assert check(one, said(one))
        assert check(one, f"\n  {said(one)}\n")
        assert not check(one, "")
        assert not check(one, "  \n")
        if task.name != "tool_calls" and not any_poem(task):
            assert not check(one, "no idea")
            assert not check(one, f"x{said(one)}x")


def test_one_answer_does_not_pass_for_another_sample(task: Task) -> None:
    if task.name == "tool_calls":
        task = replace(task, cases=("one", "two", "chain"))  # type: ignore[call-arg]
    if any_poem(task):
        return
    drawn = [sample(task, "train", 0, number) for number in range(12)]
    passing = [(a.number, b.number) for a in drawn for b in drawn if a.answer != b.answer and check(a, said(b))]
    assert not passing


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("recall", {"pairs": 3000}), ("copying", {"lines": [1, 900], "words": [9, 20]}),
        ("tool_calls", {"tools": [40, 64]}), ("needles", {"length": 50_000}),
    ],
)  # fmt: skip
def test_the_size_of_large_samples_is_known(name: str, parameters: dict[str, Any]) -> None:
    task = make_task(name, **parameters)
    bodies = [sample(task, "train", 0, number).body for number in range(5)]
    longest = max(len(body.text) if isinstance(body, Text) else len(json.dumps(vars(body))) for body in bodies)
    assert 10_000 < longest < 1.1 * task.size < 3 * longest


def test_the_span_is_what_the_assistant_says() -> None:
    for name in TASKS:
        if name == "tool_calls":
            continue
        for number in range(10):
            text = sample(make_task(name), "train", 1, number).body
            chat = sample(make_task(name, form="chat"), "train", 1, number).body
            assert isinstance(text, Text) and isinstance(chat, Chat)
            begin, end = text.span
            assert 0 < begin < end == len(text.text)
            assert text.text == text.prompt + text.text[begin:end]
            assert text.text[begin].isspace() and not text.prompt[-1].isspace()
            assert text.completion == text.text[begin:].strip()
            assert [message["role"] for message in chat.messages] == ["user", "assistant"]
            assert chat.prompt == chat.messages[:1]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [plain(sample(make_task(name), "train", 9, number)) for name in TASKS for number in range(30)]
    return Tokenizer.train(texts, 900)


def test_no_token_crosses_the_border_of_the_span(task: Task, tokenizer: Tokenizer) -> None:
    for number in range(5):
        body = sample(task, "train", 0, number).body
        if isinstance(body, Text):
            prompt, rest = body.prompt, body.text[body.span[0] :]
            assert tokenizer.encode(body.text) == tokenizer.encode(prompt) + tokenizer.encode(rest)


def test_conversations_are_rendered_and_masked(task: Task, tokenizer: Tokenizer) -> None:
    assert default_chat_template()  # the tokenizer has the project's own
    for number in range(5):
        body = sample(task, "train", 0, number).body
        if isinstance(body, Text):
            continue
        tools = list(body.tools) or None
        ids, mask = tokenizer.encode_chat_with_mask(list(body.messages), tools)
        prompt = tokenizer.encode_chat(list(body.prompt), tools)
        assert ids[: len(prompt)] == prompt
        assert all(mask[len(prompt) :][:-1])  # but for the line break at the end
        answer = sample(task, "train", 0, number).answer
        if task.name == "tool_calls":
            text = tokenizer.apply_chat_template(list(body.messages), tools, add_generation_prompt=False)
            assert text.endswith(f"<|im_start|>assistant\n{answer}<|im_end|>\n")


# ---- errors ----------------------------------------------------------------------------------------------------------

REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("sums", {}, r"synthetic task 'sums' is unknown; use arithmetic, word_problems, "),
    ("arithmetic", {"digit": [1, 2]}, r"synthetic task arithmetic: has no parameter 'digit'; it has form, operation"),
    ("arithmetic", {"form": "prose"}, r"arithmetic: form='prose' is unknown; use text, chat"),
    ("arithmetic", {"operation": "power"}, r"operation='power' is unknown; use add, subtract"),
    ("arithmetic", {"operation": ["add"]}, r"operation=\('add',\) is unknown"),
    ("arithmetic", {"digits": [3, 2]}, r"digits=\(3, 2\) must be two whole numbers, the least and the most, from 1"),
    ("arithmetic", {"digits": 4}, r"digits=4 must be two whole numbers"),
    ("arithmetic", {"digits": [True, 2]}, r"digits=\(True, 2\) must be two whole numbers"),
    ("word_problems", {"steps": [0, 2]}, r"word_problems: steps=\(0, 2\)"),
    ("tool_calls", {"form": "text"}, r"tool_calls: form='text', but tool calls are conversations; use chat"),
    ("tool_calls", {"cases": ["three"]}, r"cases=\('three',\) must be some of one, two, chain, none"),
    ("tool_calls", {"cases": []}, r"cases=\(\) must be some of"),
    ("tool_calls", {"cases": [["one"]]}, r"cases=\(\['one'\],\) must be some of"),
    ("needles", {"measure": 5}, r"needles: measure is a function, which only a program can give"),
    ("variables", {"filler": "the sea"}, r"variables: filler is a function, which only a program can give"),
    ("tool_calls", {"cases": "one"}, r"cases='one' must be some of"),
    ("passkey", {"length": 0}, r"passkey: length=0 must be a whole number from 1 to"),
    ("passkey", {"depth": 1.5}, r"depth=1\.5 must be a number from 0, the beginning, to 1, the end"),
    ("needles", {"queries": 2}, r"queries=2 must be a whole number from 1 to 1"),
    (
        "needles",
        {"keys": 2, "queries": 2, "depth": 0.5},
        r"depth places one fact; leave it out where several are asked",
    ),
    ("needles", {"kind": "uuid"}, r"kind='uuid' is unknown; use digits, hexadecimal, word"),
    ("recall", {"pairs": 2.0}, r"recall: pairs=2\.0 must be a whole number"),
    ("copying", {"order": "random"}, r"order='random' is unknown; use same, lines reversed"),
    ("variables", {"hops": -1}, r"variables: hops=-1 must be a whole number from 0"),
    ("verse_form", {"acrostic": 1}, r"acrostic=1; use true or false"),
    ("verse_form", {"acrostic": True, "lines": [7, 9]}, r"lines=\(7, 9\) allow for no acrostic; those have 3 to 6"),
    ("verse_form", {"rhymes": True, "lines": [3, 99]}, r"lines=\(3, 99\): at most 40 lines can be rhymed"),
)


@pytest.mark.parametrize(("name", "parameters", "message"), REFUSED)
def test_what_makes_no_sense_is_refused(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(AndromedaError, match=message):
        make_task(name, **parameters)


def test_what_cannot_be_drawn_is_refused() -> None:
    task = make_task("recall")
    with pytest.raises(AndromedaError, match=r"recall: split='valid' is unknown; use train or test"):
        sample(task, "valid", 0, 0)  # type: ignore[arg-type]
    with pytest.raises(AndromedaError, match="recall: sample -1 does not exist; they count from 0"):
        sample(task, "train", 0, -1)


def test_parameters_are_plain_and_make_the_task_again(task: Task) -> None:
    stated = json.loads(json.dumps(task.parameters()))
    assert make_task(task.name, **stated) == task
    with pytest.raises(FrozenInstanceError):
        task.form = "chat"  # type: ignore[misc]
