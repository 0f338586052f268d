"""Sums, differences, products and divisions of whole numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.split import Split, within
from andromeda.data.synthetic.task import Draft, Task

Operation = Literal["add", "subtract", "multiply", "divide"]
Writing = Literal["plain", "padded", "reversed"]
SIGNS: dict[Operation, str] = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
PREFACE: dict[Writing, str] = {"plain": "", "padded": "Padded: ", "reversed": "Reversed digits: "}
MOST_DIGITS = 1000


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Task):
    """`417 + 58 = 475`; `47 / 5 = 9 remainder 2`.

    Padded, operands have as many digits as the largest allowed, a sum one more and a product twice as many; reversed,
    the digits of every number stand from the ones up, as they are computed. A minus sign stays in front.

    Answers are compared as in `Task.check`, digit by digit: padding and order count.

    Attributes:
        operation: a divisor has no more digits than the dividend, and is not 0.
        digits: least and most digits of an operand; every number of digits is as likely.
    """

    name: ClassVar[str] = "arithmetic"
    operation: Operation = "add"
    digits: tuple[int, int] = (1, 4)
    writing: Writing = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of("operation", get_args(Operation))
        self._require_one_of("writing", get_args(Writing))
        self._require_range("digits", 1, MOST_DIGITS)

    def draw(self, draws: Draws, split: Split) -> Draft:
        a, b = within(split, lambda: self._operands(draws), lambda pair: fact(self.operation, *pair))
        question = f"{PREFACE[self.writing]}{self._write(a)} {SIGNS[self.operation]} {self._write(b)} ="
        answer = self._answer(a, b)
        return Draft(self._body(question, answer, lead=""), answer, (fact(self.operation, a, b),))

    def _operands(self, draws: Draws) -> tuple[int, int]:
        sizes = [draws.between(*self.digits), draws.between(*self.digits)]
        if self.operation != "divide":
            return draws.digits(sizes[0]), draws.digits(sizes[1])
        return draws.digits(max(sizes)), max(1, draws.digits(min(sizes)))

    def _answer(self, a: int, b: int) -> str:
        most = self.digits[1]
        if self.operation == "add":
            return self._write(a + b, most + 1)
        if self.operation == "subtract":
            return self._write(a - b)
        if self.operation == "multiply":
            return self._write(a * b, 2 * most)
        quotient, remainder = divmod(a, b)
        return f"{self._write(quotient)} remainder {self._write(remainder)}"

    def _write(self, number: int, width: int = 0) -> str:
        sign, digits = "-" if number < 0 else "", str(abs(number))
        if self.writing == "padded":
            digits = digits.zfill(width or self.digits[1])
        return sign + (digits[::-1] if self.writing == "reversed" else digits)


def fact(operation: Operation, a: int, b: int) -> str:
    """The content of a calculation: the two numbers added or multiplied, the smaller first, however it is asked.

    So who has trained on 12 + 34 is not tested on 34 + 12, 46 - 34 or 12 - 46, nor on 47 / 5 after 9 * 5.
    """
    if operation in ("add", "subtract"):
        pair = (a, b) if operation == "add" else (min(a, b), abs(a - b))
        return f"sum {min(pair)} {max(pair)}"
    pair = (a, b) if operation == "multiply" else (b, a // b)
    return f"product {min(pair)} {max(pair)}"
