"""Output that keeps to a JSON schema, a regular expression or the tools of a request, by llguidance.

grammars.py is what others use: from what is asked for to a `Grammar`, whose `constraint()` says token by token what may
come. It stands on schema.py (which JSON schemas can be kept to) and constraint.py (the state of one text).
"""

from andromeda.inference.grammar.constraint import GrammarConstraint
from andromeda.inference.grammar.grammars import Grammar, Grammars

__all__ = ["Grammar", "GrammarConstraint", "Grammars"]
