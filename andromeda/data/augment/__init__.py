"""Texts in another form, as a spec asks for: off unless it does. `Augmenter(rules, ...)` turns texts into token ids.

Whether a document is changed, and how, follows from the seed, its source and its name alone: the same bytes whatever
the number of workers, and whatever becomes of other documents.
"""

from andromeda.data.augment.augmenter import Augmented, Augmenter
from andromeda.data.augment.rules import Rules

__all__ = ["Augmented", "Augmenter", "Rules"]
