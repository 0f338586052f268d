"""What compute-sanitizer's racecheck says of a kernel, less what it always says of Triton's warp groups.

At the start and at the end of `gl.warp_specialize` the first warps write which function the others call, and with what,
in front of a barrier of all warps; the others read it behind that barrier. racecheck (2025.3.1) names these bytes
wherever a kernel also has an mbarrier, in the smallest one too (docs/LOG.md, 2026-11-28). They are all that Triton puts
on the two lines; what our own code reads and writes has lines of its own.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

PAIR = re.compile(
    r"=+ (?:Error|Warning): Race reported between (?P<one>\w+) access at (?P<at_one>\S+) in (?P<place_one>\S+)\n"
    r"(?P<others>(?:=+ +and \w+ access at \S+ in \S+(?: \[\d+ hazards?\])?\n)+)"
)
OTHER = re.compile(r"and (?P<kind>\w+) access at (?P<at>\S+) in (?P<place>\S+)")


def races(report: str, kernels: list[Any]) -> list[str]:
    """The races of a report but for those of the hand-over; and every other complaint in it.

    Args:
        report: of `compute-sanitizer --tool racecheck`, as it comes.
        kernels: Gluon kernels with warp groups.
    """
    handed_over = {place for kernel in kernels for place in _hand_over(kernel)}
    left = []
    for pair in PAIR.finditer(report):
        for other in OTHER.finditer(pair["others"]):
            places = f"{_kernel(pair['at_one'])} {pair['place_one']}", f"{_kernel(other['at'])} {other['place']}"
            if not handed_over.issuperset(places):
                left.append(f"{pair['one']} at {places[0]}, {other['kind']} at {places[1]}")
    return left + [line for line in PAIR.sub("", report).splitlines() if "Error:" in line or "Warning:" in line]


def _kernel(at: str) -> str:
    return at.partition("+")[0]


def _hand_over(kernel: Any) -> set[str]:
    """NAME FILE:LINE of a kernel's first line and of its `gl.warp_specialize`."""
    lines, first = inspect.getsourcelines(kernel.fn)
    name, file = kernel.fn.__name__, inspect.getsourcefile(kernel.fn) or ""
    begins = [i for i, line in enumerate(lines) if "gl.warp_specialize(" in line]
    definition = next(i for i, line in enumerate(lines) if line.startswith("def "))
    return {f"{name} {file.rpartition('/')[2]}:{first + i}" for i in (definition, *begins)}
