"""`andromeda generate`, through its function, on a small random model in a directory."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from andromeda.checkpoint import save_checkpoint
from andromeda.commands.generate import generate, read_prompt
from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.inference.generate import generate as generate_ids
from andromeda.inference.sampling import GREEDY
from andromeda.inference.text import text_prompt
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["The sea, the sea! 日本語\n" * 3], vocab_size=290)


def write_model(folder: Path, num_tokens: int) -> Andromeda:
    """It hardly ever ends a text of itself."""
    torch.manual_seed(0)
    config = AndromedaConfig(
        num_tokens=num_tokens, max_seq_len=32, dim=16, depth=1, dim_head=8, heads=2, alibi_num_heads=1,
        tie_embeddings=False,
    )  # fmt: skip
    model = Andromeda(config)
    with torch.no_grad():
        model.to_logits.weight.mul_(100)[list(TOKENIZER.stop_ids)] = 0
    save_checkpoint(folder, model, files=TOKENIZER.save)
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "verse"
    write_model(folder, num_tokens=TOKENIZER.vocab_size + 9)
    return str(folder)


def test_the_prompt_and_what_follows_it_go_to_stdout_and_the_speed_to_stderr(directory, tmp_path, capsys):
    model = write_model(tmp_path / "same", num_tokens=TOKENIZER.vocab_size + 9)
    ids = generate_ids(
        model, text_prompt(TOKENIZER, "The sea"), max_new_tokens=12, sampling=GREEDY, stop_ids=TOKENIZER.stop_ids,
        vocab_size=TOKENIZER.vocab_size,
    )  # fmt: skip
    generate(directory, prompt="The sea", max_new_tokens=12, temperature=0, seed=4)
    printed = capsys.readouterr()
    assert printed.out == "The sea" + TOKENIZER.decode(ids) + "\n"
    read = len(text_prompt(TOKENIZER, "The sea"))
    assert re.fullmatch(
        rf"{read} tokens read in \d+\.\d\d s, 12 written at [\d.]+ tokens/s "
        r"\([\d.]+ GB/s; memory here: [\d.]+\), seed 4\n",
        printed.err,
    )


def test_the_same_seed_prints_the_same_and_the_printed_seed_is_it(directory, capsys):
    generate(directory, prompt="The", max_new_tokens=20, temperature=30.0)
    first = capsys.readouterr()
    seed = int(first.err.split("seed ")[1])
    generate(directory, prompt="The", max_new_tokens=20, temperature=30.0, seed=seed)
    assert capsys.readouterr().out == first.out
    generate(directory, prompt="The", max_new_tokens=20, temperature=30.0)
    assert capsys.readouterr().out != first.out


def test_the_prompt_is_read_as_it_is_from_standard_input_or_a_file(directory, tmp_path, capsys, monkeypatch):
    text = "The sea,\n日本\n"
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    ways: list[dict[str, Any]] = [{"prompt": text}, {"prompt": "-"}, {"prompt_file": str(tmp_path / "prompt.txt")}]
    outs = []
    for way in ways:
        generate(directory, **way, max_new_tokens=5, seed=1)
        outs.append(capsys.readouterr().out)
    assert outs[0].startswith(text) and outs[1] == outs[2] == outs[0]
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfThe sea,\r\n")  # as in training: line ends stay, the mark goes
    assert read_prompt(None, str(tmp_path / "prompt.txt")) == "The sea,\r\n"


def test_json_tells_text_reason_and_usage(directory, capsys):
    generate(directory, prompt="The", max_new_tokens=30, seed=2, json=True)
    plain = json.loads(capsys.readouterr().out)
    stop = plain["text"][8:10]
    generate(directory, prompt="The", max_new_tokens=30, seed=2, stop=["never", stop], json=True)
    stopped = json.loads(capsys.readouterr().out)
    assert plain["finish_reason"] == "length" and stopped["finish_reason"] == "stop"
    assert stopped["text"] == plain["text"][: plain["text"].find(stop)]
    assert plain["prompt"] == "The" and plain["seed"] == 2
    prompt_tokens = len(text_prompt(TOKENIZER, "The"))
    assert plain["usage"] == {
        "prompt_tokens": prompt_tokens, "completion_tokens": 30, "total_tokens": prompt_tokens + 30
    }  # fmt: skip


def test_ctrl_c_ends_the_line_and_tells_the_speed(directory, capsys, monkeypatch):
    sample, drawn = torch.searchsorted, []

    def interrupted(*arguments, **options):
        drawn.append(1)
        if len(drawn) == 6:
            raise KeyboardInterrupt
        return sample(*arguments, **options)

    monkeypatch.setattr(torch, "searchsorted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(directory, prompt="The", seed=2)
    printed = capsys.readouterr()
    assert printed.out.startswith("The") and printed.out.endswith("\n") and len(printed.out) > 5
    assert "5 written at" in printed.err


def test_nothing_asked_for_prints_the_prompt(directory, capsys):
    generate(directory, prompt="The", max_new_tokens=0)
    assert capsys.readouterr() == ("The\n", "")


def test_an_empty_prompt_begins_from_nothing(directory, capsys):
    generate(directory, prompt="", max_new_tokens=5, seed=0)
    out, err = capsys.readouterr()
    assert len(out) > 2
    assert err.startswith("1 token read in ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either --prompt TEXT"),
        ({"prompt": "a", "prompt_file": "b"}, "give either --prompt TEXT"),
        ({"prompt_file": "missing.txt"}, "missing.txt: cannot be read: No such file"),
        ({"prompt_file": "latin.txt"}, r"latin.txt: is not UTF-8 text \(byte 2\)"),
        ({"prompt": "a", "temperature": -1.0}, "temperature=-1.0"),
        ({"prompt": "a", "max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"prompt": "a", "stop": [""]}, "stop string is empty"),
        ({"prompt": "a", "seed": -1}, "seed=-1"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(directory, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"ca\xe9")
    with pytest.raises(AndromedaError, match=message):
        generate(directory, **options)
    assert capsys.readouterr() == ("", "")


def test_a_prompt_on_standard_input_that_is_no_text_is_refused(directory, monkeypatch):
    content = io.BytesIO(b"caf\xe9")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(content, encoding="utf-8", errors="surrogateescape"))
    with pytest.raises(AndromedaError, match=r"standard input: is not UTF-8 text \(byte 3\)"):
        generate(directory, prompt="-")


def test_of_a_run_whose_newest_checkpoint_is_damaged_a_whole_one_is_named(tmp_path):
    first, second, third = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (5, 10, 15))
    for folder in (first, second, third):
        write_model(folder, num_tokens=TOKENIZER.vocab_size)
    for folder in (third, second):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        AndromedaError, match=rf"{third}/model.safetensors: cut short.*; an older checkpoint is whole: {first}$"
    ):
        generate(str(tmp_path), prompt="The")
    shutil.rmtree(first)
    with pytest.raises(AndromedaError, match=rf"{third}/model.safetensors: cut short.* save it again$"):
        generate(str(tmp_path), prompt="The")


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    write_model(tmp_path / "model", num_tokens=TOKENIZER.vocab_size)
    larger = Tokenizer.train(["The sea, the other sea, and all the ships of the sea " * 3], vocab_size=286)
    larger.save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", tmp_path / "model")
    with pytest.raises(AndromedaError, match=r"the tokenizer has 286 tokens, but the model only num_tokens=282"):
        generate(str(tmp_path / "model"), prompt="The")
