"""Generated tasks with exact answers, without end: `sample(make_task("needles", keys=4), "train", seed=0, number=17)`.

A sample follows from its task, split, seed and number alone. What it is about decides whether it is for training or
for testing (split.py), so the two share nothing, whatever the seeds. `check(sample, text)` judges an answer.
"""

from andromeda.data.synthetic.filler import documents_filler
from andromeda.data.synthetic.registry import TASKS, make_task
from andromeda.data.synthetic.split import SPLITS, Split, split_of
from andromeda.data.synthetic.task import Chat, Sample, Task, Text, check, sample

__all__ = [
    "SPLITS",
    "TASKS",
    "Chat",
    "Sample",
    "Split",
    "Task",
    "Text",
    "check",
    "documents_filler",
    "make_task",
    "sample",
    "split_of",
]
