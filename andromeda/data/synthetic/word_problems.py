"""Short stories with numbers, and the calculations that answer them, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import ClassVar

from andromeda.data.synthetic.arithmetic import SIGNS, Operation, fact
from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.split import Split, Unlucky, within
from andromeda.data.synthetic.task import Draft, Sample, Task, tidy
from andromeda.data.synthetic.words import PEOPLE

MARK = "Answer:"
FACTORS = (2, 9)  # what quantities are multiplied by and divided by


@dataclass(frozen=True)
class World:
    """Sentences about one quantity: {who} has {things}; {n} is the new number, {other} another person."""

    things: tuple[str, ...]
    start: tuple[str, ...]
    more: tuple[str, ...]
    less: tuple[str, ...]
    times: tuple[str, ...]
    shared: tuple[str, ...]  # the last step only, for it leaves two numbers
    asked: tuple[str, ...]

    @property
    def tellings(self) -> dict[Operation, tuple[str, ...]]:
        return {"add": self.more, "subtract": self.less, "multiply": self.times, "divide": self.shared}


WORLDS = (
    World(
        things=("shells", "stamps", "marbles", "old coins", "postcards", "feathers"),
        start=("{who} has a collection of {n} {things}.", "{who} owns {n} {things}."),
        more=("{who} finds {n} more.", "{other} gives {who} another {n}.", "Then {who} buys {n} at a market."),
        less=(
            "{who} gives {n} of them to {other}.",
            "{n} of them are lost when {who} moves house.",
            "{who} sells {n}.",
        ),
        times=("Over the years the collection grows to {n} times its size.",),
        shared=(
            "{who} puts them in albums, {n} in each. How many albums are full, and how many {things} are left over?",
            "{n} friends share them evenly. How many {things} does each get, and how many are left over?",
        ),
        asked=("How many {things} does {who} have now?", "How many {things} are in the collection now?"),
    ),
    World(
        things=("rolls", "pies", "buns", "biscuits", "pretzels"),
        start=("{who} bakes {n} {things} before dawn.", "There are {n} {things} in the bakery of {who}."),
        more=("{who} bakes another {n}.", "{n} more come out of the oven.", "{other} brings {n} from the other shop."),
        less=("{n} of them are sold by noon.", "{other} buys {n}.", "{n} are burnt and thrown away."),
        times=("For a feast, {who} bakes until there are {n} times as many.",),
        shared=(
            "They are packed in boxes of {n}. How many boxes are full, and how many {things} are left over?",
            "They are laid evenly on {n} trays. How many {things} are on each tray, and how many are left over?",
        ),
        asked=("How many {things} are there now?", "How many {things} does {who} have now?"),
    ),
    World(
        things=("books", "magazines", "maps", "records"),
        start=("A library begins the year with {n} {things}.", "The shelves of a library hold {n} {things}."),
        more=("{who} donates {n}.", "{n} more are bought in spring.", "Another {n} arrive in a crate."),
        less=("{n} are lent to a school.", "{who}, who works there, sorts out {n} that are damaged."),
        times=("After a merger the library has {n} times as many.",),
        shared=(
            "{who} sorts them into shelves of {n}. How many shelves are full, and how many {things} are left over?",
        ),
        asked=("How many {things} does the library have now?", "How many {things} are there at the end?"),
    ),
    World(
        things=("passengers",),
        start=("A ferry leaves the harbour with {n} {things}.", "A train sets off with {n} {things}."),
        more=("At the next stop {n} more get on.", "{who} gets on with a group; that makes {n} more."),
        less=("Then {n} get off.", "{n} of them leave at the next stop.", "{n} change to a bus."),
        times=("On the way back there are {n} times as many on board.",),
        shared=("All of them are seated in rows of {n}. How many rows are full, and how many {things} are left over?",),
        asked=("How many {things} are on board now?",),
    ),
    World(
        things=("euros", "dollars", "crowns"),
        start=("{who} has saved {n} {things}.", "{who} starts the month with {n} {things}."),
        more=("{who} earns {n} more.", "{other} pays back {n} that were owed.", "A prize brings {who} another {n}."),
        less=("{who} spends {n} on a coat.", "A ticket costs {who} {n}.", "{who} lends {n} to {other}."),
        times=("A good investment makes the money {n} times what it was.",),
        shared=(
            "{who} divides the money evenly among {n} people. How many whole {things} does each get, and how many "
            "{things} are left over?",
        ),
        asked=("How many {things} does {who} have now?", "How much money, in {things}, is that in the end?"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class WordProblems(Task):
    """A quantity that grows and shrinks; the completion is one calculation a line, then `Answer: 28`.

    An answer is compared as `tidy` text behind the last `Answer:`; the steps before it do not count. Every calculation
    is a fact of the split, the same facts that Arithmetic divides: the test needs no sum that training shows.

    Attributes:
        steps: least and most calculations.
        digits: least and most digits of the numbers that are added and taken away, and of the first one.
    """

    name: ClassVar[str] = "word_problems"
    steps: tuple[int, int] = (1, 4)
    digits: tuple[int, int] = (1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_range("steps", 1, 50)
        self._require_range("digits", 1, 100)

    def draw(self, draws: Draws, split: Split) -> Draft:
        world, (who, other) = draws.choice(WORLDS), draws.sample(PEOPLE, 2)
        tell = {"who": who, "other": other, "things": draws.choice(world.things)}
        count = draws.between(*self.steps)
        amount = draws.between(2, 10 ** draws.between(*self.digits) - 1)
        story, steps, content, answer = [draws.choice(world.start).format(n=amount, **tell)], [], [], ""
        tellings = {operation: cycle(draws.shuffled(some)) for operation, some in world.tellings.items()}
        for left in reversed(range(count)):
            operation, number = self._step(draws, split, amount, last=left == 0)
            story.append(next(tellings[operation]).format(n=number, **tell))
            content.append(fact(operation, amount, number))
            steps.append(f"{amount} {SIGNS[operation]} {number} = ")
            amount, rest = _result(operation, amount, number)
            answer = f"{amount} remainder {rest}" if operation == "divide" else str(amount)
            steps[-1] += answer
        if "remainder" not in answer:
            story.append(draws.choice(world.asked).format(**tell))
        completion = "\n".join([*steps, f"{MARK} {answer}"])
        return Draft(self._body(" ".join(map(_capital, story)), completion, lead="\nSteps:"), answer, tuple(content))

    def check(self, sample: Sample, text: str) -> bool:
        """Whether the line behind the last `Answer:` is the answer; `tidy`."""
        _, found, said = text.rpartition(MARK)
        return bool(found) and tidy(said.strip().partition("\n")[0]) == tidy(sample.answer)

    def _step(self, draws: Draws, split: Split, amount: int, last: bool) -> tuple[Operation, int]:
        """An operation and a number for it whose fact is of the split. Raises Unlucky where nothing is left."""
        if amount < 2:
            raise Unlucky
        operations: list[Operation] = ["add", "add", "subtract", "subtract", "multiply"]
        operation = draws.choice([*operations, "divide"] if last else operations)

        def number() -> int:
            if operation in ("multiply", "divide"):
                return draws.between(*FACTORS)
            most = 10 ** draws.between(*self.digits) - 1
            return draws.between(2, max(2, most if operation == "add" else min(most, amount - 1)))

        return operation, within(split, number, lambda chosen: fact(operation, amount, chosen))


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _result(operation: Operation, amount: int, number: int) -> tuple[int, int]:
    """The new amount, and what is left over."""
    if operation == "divide":
        return divmod(amount, number)
    return {"add": amount + number, "subtract": amount - number, "multiply": amount * number}[operation], 0
