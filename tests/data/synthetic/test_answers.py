"""Answers worked out anew from what is asked, and what the checks let pass."""

from __future__ import annotations

import re

import pytest

from andromeda.data.synthetic import Sample, Text, check, make_task, sample


def drawn(name: str, count: int = 40, **parameters: object) -> list[tuple[Sample, str]]:
    """Samples with their prompts."""
    found = [sample(make_task(name, **parameters), "train", 5, number) for number in range(count)]
    return [(one, one.body.prompt) for one in found if isinstance(one.body, Text)]


@pytest.mark.parametrize("operation", ["add", "subtract", "multiply", "divide"])
@pytest.mark.parametrize("writing", ["plain", "padded", "reversed"])
def test_arithmetic_is_right(operation: str, writing: str) -> None:
    def read(number: str) -> int:
        sign, digits = number.startswith("-"), number.lstrip("-")
        value = int(digits[::-1] if writing == "reversed" else digits)
        return -value if sign else value

    for one, prompt in drawn("arithmetic", 200, operation=operation, writing=writing, digits=[2, 6]):
        a, sign, b = re.findall(r"(\d+) ([-+*/]) (\d+) =$", prompt)[0]
        x, y, numbers = read(a), read(b), [read(number) for number in one.answer.split(" remainder ")]
        results = {"+": [x + y], "-": [x - y], "*": [x * y], "/": [*divmod(x, y or 1)]}
        assert numbers == results[sign]
        width = {"add": 7, "subtract": 6, "multiply": 12, "divide": 6}[operation]
        if writing == "padded":
            assert {len(a), len(b)} == {6}
            assert {len(number.lstrip("-")) for number in one.answer.split(" remainder ")} <= {width, 6}
            assert not check(one, one.answer.lstrip("0") if one.answer.startswith("0") else "0" + one.answer)
        else:
            assert 2 <= min(len(a), len(b)) <= max(len(a), len(b)) <= 6


def test_a_right_answer_may_end_in_a_full_stop_and_have_more_lines_behind_it() -> None:
    one, _ = drawn("arithmetic", 1)[0]
    assert check(one, f" {one.answer}.\nAnd 1 + 1 = 2")
    assert not check(one, f"Well,\n{one.answer}")


def test_word_problems_are_worked_step_by_step() -> None:
    for one, prompt in drawn("word_problems", 200, steps=[1, 5]):
        assert isinstance(one.body, Text)
        *steps, last = one.body.completion.splitlines()
        story = [int(number) for number in re.findall(r"\d+", prompt)]
        amount = story[0]
        for step, number in zip(steps, story[1:], strict=True):
            a, sign, b, result, rest = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)(?: remainder (\d+))?", step)[0]
            assert (int(a), int(b)) == (amount, number)
            right = {"+": amount + number, "-": amount - number, "*": amount * number, "/": amount // number}
            assert int(result) == right[sign]
            assert rest == (str(amount % number) if sign == "/" else "")
            amount = int(result)
        assert last == f"Answer: {one.answer}"
        assert prompt.count("?") == 1


def test_word_problems_are_judged_by_their_last_answer() -> None:
    one, _ = drawn("word_problems", 1)[0]
    assert check(one, f"Let me see. Answer: 0. No! Answer:  {one.answer}.\n")
    assert not check(one, one.answer)
    assert not check(one, f"Answer: {one.answer} Answer: 0")


def test_recall_answers_what_stands_behind_the_keys() -> None:
    for one, prompt in drawn("recall", pairs=20, queries=3):
        pairs = dict(re.findall(r"^(\w+): (\d+)$", prompt, re.M))
        asked = re.findall(r"these words: (.*)\?", prompt)[0].split(", ")
        assert len(pairs) == 20
        assert one.answer == ", ".join(pairs[key] for key in asked)
        assert check(one, f"\n{one.answer.replace(', ', ',')}.\n")
        if len({pairs[key] for key in asked}) == 3:
            assert not check(one, ", ".join(pairs[key] for key in asked[::-1]))


def test_copying_in_every_order() -> None:
    for order in ("same", "lines reversed", "words reversed", "selected"):
        for one, prompt in drawn("copying", order=order):
            request, shown, _ = prompt.split("\n\n")
            lines, copied = shown.splitlines(), one.answer.splitlines()
            if order == "selected":
                numbers = re.findall(r"\d+", request)
                lines = [line.partition(". ")[2] for line in lines if line.partition(".")[0] in numbers]
            elif order == "lines reversed":
                lines.reverse()
            elif order == "words reversed":
                lines = [" ".join(reversed(line.split())) for line in lines]
            assert copied == lines
            assert check(one, "\n\n".join(f" {line} " for line in lines))
            assert not check(one, "\n".join([*lines, lines[0]]))


def test_variables_are_followed_through_all_assignments() -> None:
    for one, prompt in drawn("variables", length=1500, chains=3, hops=4):
        held: dict[str, str] = {}
        for name, source in re.findall(r"Let (\w+) = (\w+)\.", prompt):
            assert name not in held
            held[name] = source if source.isdigit() else held[source]  # assigned before it is used
        value = re.findall(r"hold (\d+) at the end", prompt)[0]
        names = [name for name in held if held[name] == value]
        assert len(held) == 15 and len(names) == 5
        assert one.answer == ", ".join(names)
        assert check(one, ",".join(reversed(names)))
        assert not check(one, ", ".join(names[1:]))
        assert not check(one, ", ".join([*names, names[0]]))


def test_needles_asked_for_are_found_and_only_those() -> None:
    for one, prompt in drawn("needles", length=3000, keys=5, queries=2, values=2):
        hay, question = prompt.rsplit("\n\n", 2)[:2]
        asked = re.findall(r"the (\w+ \w+)[:,?]? ?", question.partition(":")[2].partition("?")[0].replace(" and", ","))
        held = {key: re.findall(rf"{key}[^.]*?(\d{{7}})", hay) for key in asked}
        assert len(held) == 2
        assert [len(values) for values in held.values()] == [2, 2]
        lines = [f"{key}: {', '.join(values)}" for key, values in held.items()]
        assert check(one, "\n".join(lines))
        assert check(one, "\n".join(reversed(lines)))
        assert not check(one, lines[0])
        (a, b), (c, d) = held.values()
        assert not check(one, f"{asked[0]}: {c}, {d}\n{asked[1]}: {a}, {b}")


def test_all_values_of_a_needle_are_asked_for_in_any_order() -> None:
    for one, _ in drawn("needles", 10, length=2000, values=3):
        a, b, c = one.answer.split(", ")
        assert check(one, f"{c}, {a},{b}.")
        assert not check(one, f"{a}, {b}")
        assert not check(one, f"{a}, {b}, {c}, {c}")
