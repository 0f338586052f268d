"""The tasks by name, as specs name them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from andromeda.data.synthetic.arithmetic import Arithmetic
from andromeda.data.synthetic.copying import Copying
from andromeda.data.synthetic.needles import Needles, Passkey
from andromeda.data.synthetic.recall import Recall
from andromeda.data.synthetic.task import Task
from andromeda.data.synthetic.tools import ToolCalls
from andromeda.data.synthetic.variables import Variables
from andromeda.data.synthetic.verse import VerseForm
from andromeda.data.synthetic.word_problems import WordProblems
from andromeda.errors import AndromedaError

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Arithmetic, WordProblems, ToolCalls, Passkey, Needles, Recall, Copying, Variables, VerseForm)
}


def make_task(name: str, /, **parameters: Any) -> Task:
    """The task of that name; lists, as YAML gives them, stand for tuples.

    Raises:
        AndromedaError: an unknown task or parameter, or a value that the task refuses.
    """
    if name not in TASKS:
        raise AndromedaError(f"synthetic task {name!r} is unknown; use {', '.join(TASKS)}")
    known = [field.name for field in fields(TASKS[name])]
    for parameter in parameters:
        if parameter not in known:
            raise AndromedaError(f"synthetic task {name}: has no parameter {parameter!r}; it has {', '.join(known)}")
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in parameters.items()}
    return TASKS[name](**values)
