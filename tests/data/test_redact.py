"""Each kind of secret and address is found, and what looks like one is left."""

from __future__ import annotations

import string
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.data.redact import KINDS, redact

# Put together here, so that no scanner takes them for real ones.
TAIL = "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1eF3hJ5kM7"
BODY = "MIIEpAIBAAKCAQEA" + TAIL * 3
PRIVATE = f"-----BEGIN RSA {'PRIVATE'} KEY-----\n{BODY}\n-----END RSA {'PRIVATE'} KEY-----"


def redacted(text: str, kinds: tuple[str, ...] = KINDS) -> tuple[str, dict[str, int]]:
    changes: Counter[str] = Counter()
    return redact(text, kinds, changes), dict(changes)


@pytest.mark.parametrize(
    ("kind", "secret", "name"),
    [
        ("keys", PRIVATE, "private key"),
        ("keys", PRIVATE.replace("\n", "\\n"), "private key"),
        ("keys", PRIVATE[:150], "private key"),
        ("keys", "AKIA" + "IOSFODNN7ABCDEFG", "AWS key"),
        ("keys", "ghp_" + TAIL[:36], "GitHub token"),
        ("keys", "github_pat_" + TAIL, "GitHub token"),
        ("keys", "xoxb-" + "123456789012-abcdef", "Slack token"),
        ("keys", "AIza" + TAIL[:35], "Google key"),
        ("keys", "sk-" + TAIL, "API key"),
        ("emails", "jane.doe+x@mail.somewhere.co.uk", "e-mail address"),
        ("addresses", "93.184.216.34", "IP address"),
        ("addresses", "2606:2800:220:1:248:1893:25c8:1946", "IP address"),
        ("addresses", "2a00:1450::200e", "IP address"),
    ],
)
@pytest.mark.parametrize("around", [("", ""), ("see ", ", and"), ('x = "', '"'), ("(", ")."), ("a\n", "\nb")])
def test_found(kind: str, secret: str, name: str, around: tuple[str, str]) -> None:
    before, after = around
    assert redacted(before + secret + after, (kind,)) == (f"{before}[{name}]{after}", {name: 1})
    others = tuple(other for other in KINDS if other not in (kind, "assignments"))
    assert redacted(before + secret + after, others) == (before + secret + after, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'api_key = "{TAIL}"', 'api_key = "[secret]"'),
        (f"AWS_SECRET_ACCESS_KEY={TAIL}\nA=1", "AWS_SECRET_ACCESS_KEY=[secret]\nA=1"),
        (f'{{"password": "{TAIL}", "a": 1}}', '{"password": "[secret]", "a": 1}'),
        (f"token: {TAIL}", "token: [secret]"),
        (f"SECRET_TOKEN := '{TAIL}'", "SECRET_TOKEN := '[secret]'"),
        ("'auth_token' => '0f1e2d3c4b5a69788796a5b4c3d2e1f0'", "'auth_token' => '[secret]'"),
    ],
)
def test_random_strings_with_a_telling_name(text: str, expected: str) -> None:
    assert redacted(text, ("assignments",)) == (expected, {"secret": 1})


@pytest.mark.parametrize(
    "text",
    [
        "token = self.tokenizer.next_token2(position)", 'password = "correct horse battery staple"',
        "secret: 12345678901234567890", 'api_key = "your_api_key_goes_here"', "token = 'aaaaaaaaaaaaaaaa1111'",
        f"digest = '{TAIL}'", "The secret: everything_is_written_down_here.", "token = os.environ['API_TOKEN_VALUE_1']",
        "git@github.com:a/b.git", "user@example.com", "a@b", "@decorator", "x @ y.z", "me@host.test", "a@1.2.3",
        "127.0.0.1", "192.168.0.1", "10.1.2.3", "1.2.3", "1.2.3.4.5", "999.1.1.1", "v93.184.216.34", "93.184.216.34.x",
        "2001:db8::1", "::1", "fe80::1", "std::vector", "12:30:45", "2023:10", "2400:2",
        "-----BEGIN PRIVATE KEY----- is how it begins", "AKIA", "task-force-of-many-kinds-and-more",
        "sk-learn-contrib-x",
    ],
)  # fmt: skip
def test_left_alone(text: str) -> None:
    assert redacted(text) == (text, {})


def test_each_is_counted() -> None:
    text = "a@b.org, c@d.org and 8.8.8.8"
    expected = ("[e-mail address], [e-mail address] and [IP address]", {"e-mail address": 2, "IP address": 1})
    assert redacted(text) == expected


@given(st.text(st.sampled_from("a1@.:=-_/ \"'2f"), max_size=80))
def test_twice_is_once(text: str) -> None:
    once, _ = redacted(text)
    assert redacted(once) == (once, {})


@pytest.mark.parametrize(
    "piece", ["a", "a.", "1.", "2:", "a@", "token=", "=a1", "-----BEGIN PRIVATE KEY-----", string.printable]
)
def test_time_is_linear_in_the_text(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    redacted(text)
    assert time.process_time() - start < 10  # a quadratic pattern takes many minutes
