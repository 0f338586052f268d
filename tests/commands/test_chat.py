"""`andromeda chat`, through a pipe and through a terminal, on a small random model."""

from __future__ import annotations

import io
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.checkpoint import save_checkpoint
from andromeda.commands.chat import Conversation, chat
from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.inference.sampling import Sampling
from andromeda.inference.text import chat_prompt, stream_text
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["The sea, the sea! user assistant\n" * 3], vocab_size=290)


def build(ends: float = 0.0) -> Andromeda:
    """Random weights; `ends` is how far an end of a turn stands out among the tokens."""
    torch.manual_seed(5)
    config = AndromedaConfig(
        num_tokens=TOKENIZER.vocab_size, max_seq_len=64, dim=16, depth=2, dim_head=8, heads=2, alibi_num_heads=1,
        tie_embeddings=False,
    )  # fmt: skip
    model = Andromeda(config).double()
    with torch.no_grad():
        model.to_logits.weight.mul_(100)[list(TOKENIZER.stop_ids)] *= ends
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "chat"
    save_checkpoint(folder, build(), files=TOKENIZER.save)
    return str(folder)


def piped(content: bytes) -> io.TextIOWrapper:
    """Standard input as Python opens it in the C locale."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors="surrogateescape")


@pytest.fixture
def talk(directory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is printed for lines that come through a pipe."""

    def run(*lines: str, **options: object) -> str:
        monkeypatch.setattr("sys.stdin", piped("".join(f"{line}\n" for line in lines).encode()))
        chat(directory, **{"max_new_tokens": 12, "seed": 1, **options})  # type: ignore[arg-type]
        return capsys.readouterr().out

    return run


def expected_answers(questions: list[str], system: str | None = None) -> str:
    """The same conversation, each prompt rendered and read from its beginning."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    out = ""
    for question in questions:
        messages.append({"role": "user", "content": question})
        stream = stream_text(
            build(), TOKENIZER, chat_prompt(TOKENIZER, messages), max_new_tokens=12,
            sampling=Sampling(temperature=0.8, min_p=0.05), seed=1 + len(messages),
        )  # fmt: skip
        answer = "".join(stream)
        messages.append({"role": "assistant", "content": answer})
        out += answer + "\n"
    return out


def test_each_piped_line_is_answered_until_the_input_ends(talk):
    assert talk("The sea?") == expected_answers(["The sea?"])
    assert talk("The sea?", "", "  ", system="Be brief.") == expected_answers(["The sea?"], "Be brief.")
    assert talk() == ""


def test_reset_forgets_and_exit_ends(talk):
    one = expected_answers(["The sea?"])
    assert talk("The sea?", "/reset", "The sea?", "/exit", "The sea?") == one + one
    assert talk("The sea?", "the other sea?") != one + one


def test_an_unknown_command_is_explained_and_not_sent(talk):
    out = talk("/rest")
    assert out.startswith("/reset forgets the conversation") and out.count("\n") == 1


def test_input_that_is_no_text_is_refused(directory, monkeypatch):
    monkeypatch.setattr("sys.stdin", piped(b"/reset\ncaf\xe9\n"))
    with pytest.raises(AndromedaError, match=r"standard input, line 2: is not UTF-8 text \(byte 3\)"):
        chat(directory)


def test_wrong_settings_are_refused(directory):
    with pytest.raises(AndromedaError, match="top_p=0"):
        chat(directory, top_p=0.0)


# ---- the cache between turns -------------------------------------------------------------------------


def converse(model: Andromeda, questions: list[str], seed: int = 1, tokens: int = 10) -> Conversation:
    conversation = Conversation(model, TOKENIZER, Sampling(temperature=1.0), tokens, seed)
    for question in questions:
        conversation.answer(question, lambda piece: None)
    return conversation


@pytest.mark.parametrize("ends", [0.0, 3.0])
def test_only_new_tokens_are_read_in_the_next_turn(ends):
    """Though the model's tokens are seldom those that the tokenizer would choose for the same text."""
    model = build(ends)
    # Bytes of one character each, in more tokens than needed: the tokenizer would merge them.
    letters = TOKENIZER.encode("t")[0], TOKENIZER.encode("h")[0], TOKENIZER.encode("e")[0]
    with torch.no_grad():
        model.to_logits.weight[letters, :] *= 10
    conversation = converse(model, ["The sea?"])
    for question in ("the sea", "and the sea"):
        held = conversation.context.cache.length
        completion = conversation.answer(question, lambda piece: None)
        assert completion.cached_tokens == held > 20
    asked = conversation.context.ids[: conversation._prompt_tokens]
    canonical = chat_prompt(TOKENIZER, conversation.messages[:-1])
    assert TOKENIZER.decode(asked, skip_special=False) == TOKENIZER.decode(canonical, skip_special=False)
    assert asked != canonical


@settings(max_examples=15)
@given(
    st.lists(st.sampled_from(["the sea", "?", "sea user", "<|im_end|>", "日"]), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_the_text_that_was_read_is_the_conversation(questions, seed):
    """Whatever was kept and whatever was read again, broken characters and all."""
    conversation = converse(build(ends=1.0), questions, seed)
    conversation.answer("last", lambda piece: None)
    prompt = conversation.context.ids[: conversation._prompt_tokens]
    messages = conversation.messages[:-1]
    canonical = chat_prompt(TOKENIZER, messages)
    assert TOKENIZER.decode(prompt, skip_special=False) == TOKENIZER.decode(canonical, skip_special=False)


@pytest.mark.parametrize(
    ("opening", "content"),
    [
        ("", "message.content if loop.revindex < 3 else '...'"),  # as where earlier thoughts are dropped
        ("{{ messages | length }} messages\n", "message.content"),
    ],
)
def test_a_template_may_change_what_came_before(tmp_path, opening, content):
    """What the model reads follows it."""
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        opening + "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ " + content + " }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
    )
    tokenizer = Tokenizer.load(tmp_path)
    conversation = Conversation(build(), tokenizer, Sampling(), 10, seed=1)
    for question in ("one", "two", "three"):
        conversation.answer(question, lambda piece: None)
        asked = conversation.context.ids[: conversation._prompt_tokens]
        canonical = chat_prompt(tokenizer, conversation.messages[:-1])
        assert tokenizer.decode(asked, skip_special=False) == tokenizer.decode(canonical, skip_special=False)


def test_control_tokens_that_the_model_draws_are_no_part_of_the_conversation():
    """They are not shown, so they are not read again either."""
    model, logits = build(), Andromeda.logits
    allowed = torch.full((TOKENIZER.vocab_size,), -torch.inf, dtype=torch.float64)
    allowed[[TOKENIZER.token_to_id("<|im_start|>"), *TOKENIZER.encode("thesa")]] = 0.0
    model.logits = lambda hidden: logits(model, hidden) / 50 + allowed  # type: ignore[method-assign]
    conversation = converse(model, ["one", "two", "three"], tokens=20)
    drawn = conversation.context.ids[conversation._prompt_tokens :]
    assert TOKENIZER.token_to_id("<|im_start|>") in drawn
    canonical = chat_prompt(TOKENIZER, conversation.messages[:-1])
    assert conversation.context.ids[: conversation._prompt_tokens] == canonical


def test_ctrl_c_keeps_what_was_said():
    model = build()
    conversation = converse(model, ["The sea?"])
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    completion = conversation.answer("again", show)
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(shown)}
    assert completion.completion_tokens < 10
    assert conversation.answer("more", lambda piece: None).completion_tokens == 10


# ---- a terminal --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_terminal_has_a_prompt_and_ctrl_c_cuts_an_answer_short(directory):
    import pty

    terminal, child = pty.openpty()
    program = f"from andromeda.commands.chat import chat; chat({directory!r}, max_new_tokens=10**9)"
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=child, stdout=child, stderr=child, cwd=root, start_new_session=True,
        preexec_fn=lambda: make_controlling(child),
    )  # fmt: skip
    os.close(child)
    try:
        assert "Ctrl-C" in read_until(terminal, r"> $")
        os.write(terminal, b"The sea?\n")
        read_until(terminal, r"(?s)The sea\?\r\n.{50}")
        os.write(terminal, b"\x03")
        read_until(terminal, r"tokens/s .*\r\n> $")
        os.write(terminal, b"/exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def make_controlling(terminal: int) -> None:
    """So that Ctrl-C typed there is a signal to the program."""
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def read_until(terminal: int, pattern: str, seconds: float = 120) -> str:
    seen, ends = "", time.monotonic() + seconds
    while not re.search(pattern, re.sub("\x1b\\[[0-9;?]*[a-z]", "", seen)):
        ready, _, _ = select.select([terminal], [], [], max(0.0, ends - time.monotonic()))
        try:
            new = os.read(terminal, 65536) if ready else b""
        except OSError:  # the program has ended
            new = b""
        assert new, f"{pattern!r} did not come; what did: {seen}"
        seen += new.decode(errors="replace")
    return seen
