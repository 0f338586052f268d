"""One task of each kind and setting, which several tests go through."""

from __future__ import annotations

from typing import Any

import pytest

from andromeda.data.synthetic import Task, make_task

EXAMPLES: tuple[tuple[str, dict[str, Any]], ...] = (
    *(
        ("arithmetic", {"operation": operation, "writing": writing})
        for operation in ("add", "subtract", "multiply", "divide")
        for writing in ("plain", "padded", "reversed")
    ),
    ("word_problems", {}),
    ("word_problems", {"form": "chat", "steps": [3, 6]}),
    ("tool_calls", {}),
    ("tool_calls", {"tools": [8, 16]}),
    ("passkey", {"length": 1500}),
    ("needles", {"length": 1500, "keys": 4}),
    ("needles", {"length": 1500, "values": 3, "kind": "word"}),
    ("needles", {"length": 2500, "keys": 4, "queries": 3, "values": 2, "kind": "hexadecimal", "form": "chat"}),
    ("recall", {}),
    ("recall", {"pairs": 300, "queries": 3}),
    *(("copying", {"order": order}) for order in ("same", "lines reversed", "words reversed", "selected")),
    ("variables", {"length": 1500}),
    ("variables", {"length": 1500, "chains": 1, "hops": 0, "form": "chat"}),
    *(
        ("verse_form", {"count": count, "acrostic": acrostic, "rhymes": rhymes})
        for count in ("nothing", "words", "syllables")
        for acrostic in (False, True)
        for rhymes in (False, True)
    ),
)


@pytest.fixture(params=EXAMPLES, ids=lambda example: "-".join(map(str, [example[0], *example[1].values()])))
def task(request: pytest.FixtureRequest) -> Task:
    name, parameters = request.param
    return make_task(name, **parameters)
