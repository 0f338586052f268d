"""Secrets and addresses, found by their shapes and replaced by what they were, in brackets: [AWS key].

Kinds: `keys` have shapes that nothing else has; `assignments` are random strings given to a name such as `api_key`;
`emails` and `addresses` leave out those that stand for nobody: RFC 2606's domains, networks that are not public.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

KINDS = ("keys", "assignments", "emails", "addresses")


@dataclass(frozen=True)
class Shape:
    """
    Attributes:
        name: what takes its place.
        hints: one of them stands in every text that holds the shape; looking for it is quick.
        pattern: with a group `value`, only that is replaced. Bounded, so that its time is linear in the text.
        real: tells what is meant from what looks like it.
    """

    name: str
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    real: Callable[[re.Match[str]], bool] = lambda found: True


def redact(text: str, kinds: Collection[str], changes: Counter[str]) -> str:
    """The text without secrets of these KINDS, counted in `changes` by name."""
    for kind in KINDS:
        for shape in SHAPES[kind] if kind in kinds else ():
            text = _replaced(text, shape, changes)
    return text


def _replaced(text: str, shape: Shape, changes: Counter[str]) -> str:
    if not any(hint in text for hint in shape.hints):
        return text
    group = "value" if "value" in shape.pattern.groupindex else 0

    def replacement(found: re.Match[str]) -> str:
        if not shape.real(found):
            return found[0]
        changes[shape.name] += 1
        start, end = found.start(group) - found.start(), found.end(group) - found.start()
        return f"{found[0][:start]}[{shape.name}]{found[0][end:]}"

    return shape.pattern.sub(replacement, text)


# ---- what looks like a secret and is none --------------------------------------------------------


def _random(value: str) -> bool:
    """Letters and digits, with the entropy of a key (hexadecimal: of at most 4 bits) rather than of a name."""
    if not (any(c.isdigit() for c in value) and any(c.isalpha() for c in value)):
        return False
    counts = Counter(value)
    bits = -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())
    return bits >= (3.0 if re.fullmatch("[0-9a-fA-F]+", value) else 3.5)


def _secret(found: re.Match[str]) -> bool:
    return SECRET_NAME.search(found.string, max(0, found.start() - 80), found.start()) is not None and _random(
        found["value"]
    )


def _personal(found: re.Match[str]) -> bool:
    name, _, domain = found[0].lower().partition("@")
    return name != "git" and RESERVED.search(domain) is None  # git@host is how repositories are named


def _public(found: re.Match[str]) -> bool:
    try:
        return ipaddress.ip_address(found[0]).is_global
    except ValueError:
        return False


# ---- shapes --------------------------------------------------------------------------------------

SECRET_NAME = re.compile(r"(?i:api[_-]?key|access[_-]?key|secret|token|passw(?:or)?d)[\w-]{0,40}[\"']?\s{0,9}:?$")
RESERVED = re.compile(r"(^|\.)(example\.(com|net|org)|example|test|invalid|localhost)$")

# A pattern that begins with a set of characters is searched for several times as fast as one that begins with a look
# behind, so what must not stand before is looked for behind the first character.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "keys": (
        Shape(
            "private key",
            ("PRIVATE KEY",),
            re.compile(
                r"-----BEGIN (?P<of>(?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?)-----"
                r"(?:(?:[\w+/=\s\\:,.\"'()@<>]|-(?!-)){0,20000}?-----END (?P=of)-----"
                r"|(?:(?:\s|\\[nr]){0,4}[A-Za-z0-9+/=]{48,}){1,400})"
            ),
        ),
        Shape("AWS key", ("AKIA", "ASIA"), re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
        Shape(
            "GitHub token",
            ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
            re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,255})\b"),
        ),
        Shape(
            "Slack token",
            ("xox", "hooks.slack.com"),
            re.compile(
                r"\bxox[abeoprs]-[A-Za-z0-9-]{10,255}|\bhooks\.slack\.com/services/T\w{1,20}/B\w{1,20}/\w{1,40}"
            ),
        ),
        Shape("Google key", ("AIza",), re.compile(r"\bAIza[\w-]{35}(?![\w-])")),
        Shape(
            "API key",
            ("sk-", "k_live_"),
            re.compile(r"\b(?:sk-[\w-]{20,255}|[rs]k_live_\w{24,255})"),
            lambda found: _random(found[0]),
        ),
    ),
    "assignments": (
        Shape(
            "secret",
            ("=", ":"),
            re.compile(
                r"[=:]>?\s{0,9}(?:(?P<quote>[\"'])(?=[^\s\"'\[\]]{16,255}(?P=quote))"
                r"|(?=[\w+/=-]{20,255}(?![\w.(\[+/=-])))(?P<value>[^\s\"'\[\],;]{16,255})"
            ),
            _secret,
        ),
    ),
    "emails": (
        Shape(
            "e-mail address",
            ("@",),
            re.compile(r"[\w.%+-](?<![\w.%+-]{2})[\w.%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"),
            _personal,
        ),
    ),
    "addresses": (
        Shape("IP address", (".",), re.compile(r"\d(?<![\w.]\d)\d{0,2}(?:\.\d{1,3}){3}(?!\.?\w)"), _public),
        Shape(
            "IP address",
            (":",),
            re.compile(r"[23](?<![\w:.][23])[0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])"),
            _public,
        ),
    ),
}
