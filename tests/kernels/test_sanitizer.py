"""What is left of racecheck's reports: everything but the hand-over to a second warp group."""

from __future__ import annotations

import inspect

import pytest

from tests.kernels.sanitizer import races

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
flash_hopper = pytest.importorskip("andromeda.kernels.flash_hopper")
LINES, FIRST = inspect.getsourcelines(flash_hopper.ring_forward_kernel.fn)
DEFINITION = FIRST + LINES.index("def ring_forward_kernel(\n")
HAND_OVER = FIRST + next(i for i, line in enumerate(LINES) if "gl.warp_specialize(" in line)
SUMMARY = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"


def report(*races: tuple[int, int], kernel: str = "ring_forward_kernel") -> str:
    return "========= COMPUTE-SANITIZER\n" + "".join(
        f"========= Error: Race reported between Read access at {kernel}+0x5d0 in flash_hopper.py:{read}\n"
        f"=========     and Write access at {kernel}+0x58d0 in flash_hopper.py:{write} [1 hazards]\n========= \n"
        for read, write in races
    ) + SUMMARY  # fmt: skip


def test_the_hand_over_is_left_out() -> None:
    assert "warp_specialize" in LINES[HAND_OVER - FIRST]
    text = report((DEFINITION, HAND_OVER), (DEFINITION, DEFINITION))
    assert races(text, [flash_hopper.ring_forward_kernel]) == []
    assert len(races(text, [])) == 2


@pytest.mark.parametrize("place", [(DEFINITION, HAND_OVER - 1), (DEFINITION + 40, HAND_OVER), (1, 2)])
def test_all_else_is_kept(place: tuple[int, int]) -> None:
    assert len(races(report((DEFINITION, HAND_OVER), place), [flash_hopper.ring_forward_kernel])) == 1
    assert len(races(report((DEFINITION, HAND_OVER), kernel="another"), [flash_hopper.ring_forward_kernel])) == 1


def test_several_writers_of_one_read_are_each_looked_at() -> None:
    text = report((DEFINITION, HAND_OVER)).replace(
        "[1 hazards]\n",
        "[1 hazards]\n=========     and Write access at ring_forward_kernel+0x60 in flash_hopper.py:190 [2 hazards]\n",
    )
    assert races(text, [flash_hopper.ring_forward_kernel]) == [
        f"Read at ring_forward_kernel flash_hopper.py:{DEFINITION}, Write at ring_forward_kernel flash_hopper.py:190"
    ]


def test_other_complaints_are_kept() -> None:
    text = report((DEFINITION, HAND_OVER)) + "========= Error: process didn't terminate successfully\n"
    assert races(text, [flash_hopper.ring_forward_kernel]) == ["========= Error: process didn't terminate successfully"]
