from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from andromeda.chat import Guard, default_chat_template
from andromeda.errors import AndromedaError
from andromeda.tokenizer import SPECIAL_TOKENS, TOOL_TOKENS, Tokenizer, control
from andromeda.tokenizer.streaming import BYTE_OF_CHARACTER

VERSE = """O rose, thou art sick!
The invisible worm,
That flies in the night,
In the howling storm,

Has found out thy bed
Of crimson joy;
    And his dark secret love
    Does thy life destroy.
"""
CORPUS = [
    VERSE * 2,
    '{"name": "get_weather", "arguments": {"city": "Paris"}}\n' * 2,
    "Zoë said: 日本語 and 12345 + 678 🙂\n" * 2,
]
HOSTILE = [
    *("<|im_end|>", "<|im_start|>system\n", "<|im_end|", "|>", "im_end|>", "<", "<|endoftext|>", " <|pad|> "),
    *("<tool_call>", "</tool_call>", "</tool_response>", "</tools>", "</s>", "[INST]", "[/INST]", "<s>", "<|eot_id|>"),
    *("<|user|>", "<|end|>", "</think>", "\n", "  ", "Tiger, tiger", "é日🙂", '"}', "{{ bos_token }}", "<<|im_end|>"),
]
hostile_text = st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=5).map("".join)
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.train(CORPUS, 400)


def control_ids(tokenizer: Tokenizer, names: Sequence[str]) -> set[int]:
    return {token_id for name in names if (token_id := tokenizer.token_to_id(name)) is not None}


def special_ids(theirs: tokenizers.Tokenizer) -> set[int]:
    """Ids that ordinary text must not have. What the model does not know may be in it."""
    added = theirs.get_added_tokens_decoder()
    return {i for i, token in added.items() if token.special and token.content not in ("<unk>", "[UNK]")}


# ---- training ----------------------------------------------------------------------------------------


def test_training_again_in_another_process_with_other_threads_gives_the_same_bytes(ours: Tokenizer) -> None:
    code = f"from andromeda.tokenizer import Tokenizer; print(Tokenizer.train({CORPUS!r}, 400).sha256)"
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ours.sha256 == Tokenizer.train(CORPUS, 400).sha256


def test_training_on_other_text_gives_another_fingerprint(ours: Tokenizer) -> None:
    assert Tokenizer.train(["thou " * 9], 400).sha256 != ours.sha256


@given(any_text)
def test_any_text_comes_back(ours: Tokenizer, text: str) -> None:
    assert ours.decode(ours.encode(text)) == text


def test_every_byte_is_in_the_vocabulary() -> None:
    smallest = Tokenizer.train(["x"], 256 + len(SPECIAL_TOKENS) + len(TOOL_TOKENS))
    assert smallest.vocab_size == 266
    assert smallest.decode(smallest.encode("".join(map(chr, range(0x900))))) == "".join(map(chr, range(0x900)))


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(AndromedaError, match=r"vocab_size=265 .* need 266"):
        Tokenizer.train(CORPUS, 265)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_training_on_nothing_is_refused(texts: list[str]) -> None:
    with pytest.raises(AndromedaError, match="no text"):
        Tokenizer.train(texts, 400)


def test_training_on_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(AndromedaError, match="text 1 is not valid Unicode"):
        Tokenizer.train(["rose", "\ud800"], 400)


def test_digits_stand_alone_and_a_break_with_its_indentation_is_one_token(ours: Tokenizer) -> None:
    tokens = [ours.decode([token_id]) for token_id in ours.encode("joy;\n    And 1234\n\nHas")]
    assert [token for token in tokens if token.isdigit()] == ["1", "2", "3", "4"]
    assert {"\n    ", "\n\n"} <= set(tokens)
    assert not any(re.search(r"\S\n|\n\S|\d.", token) for token in tokens)


def test_special_tokens_can_be_chosen() -> None:
    chosen = Tokenizer.train(CORPUS, 300, special_tokens=["<eos>", "<bos>"], tool_tokens=[])
    assert (chosen.eos_id, chosen.bos_id, chosen.pad_id) == (298, 299, 298)
    assert chosen.stop_ids == (298,)
    with pytest.raises(AndromedaError, match="no chat template"):
        chosen.encode_chat([{"role": "user", "content": "hi"}])


# ---- text and ids ------------------------------------------------------------------------------------


@given(hostile_text)
def test_text_never_becomes_a_control_token(ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text)
    assert control_ids(ours, [*SPECIAL_TOKENS, *TOOL_TOKENS]).isdisjoint(ids)
    assert ours.decode(ids) == text


def test_trusted_text_may_hold_control_tokens(ours: Tokenizer) -> None:
    ids = ours.encode("a<|im_end|><tool_call>", allow_special=True)
    assert ids[1:] == [ours.token_to_id("<|im_end|>"), ours.token_to_id("<tool_call>")]
    assert ours.decode(ids) == "a<tool_call>"
    assert ours.decode(ids, skip_special=False) == "a<|im_end|><tool_call>"


def test_a_batch_is_encoded_as_its_texts(ours: Tokenizer) -> None:
    texts = [*CORPUS, "", *HOSTILE]
    assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]


def test_a_long_text_lets_other_threads_go_on(ours: Tokenizer) -> None:
    """A server has one tokenizer for all: who sends megabytes must not stop the others."""
    encoding = threading.Thread(target=ours.encode, args=("1" * 500_000,))
    turns = 0
    encoding.start()
    while encoding.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20


def test_bad_text_is_refused(ours: Tokenizer) -> None:
    with pytest.raises(AndromedaError, match="lone surrogate at character 2"):
        ours.encode("ab\ud800")
    with pytest.raises(AndromedaError, match=r"text 1 of the batch .* lone surrogate"):
        ours.encode_batch(["ab", "\ud800"])
    with pytest.raises(AndromedaError, match="not bytes"):
        ours.encode(b"ab")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1, 400, 2**40])
def test_ids_out_of_range_are_refused(ours: Tokenizer, wrong: int) -> None:
    assert ours.vocab_size == 400
    actions: list[Callable[[], object]] = [
        lambda: ours.decode([0, wrong]),
        lambda: ours.id_to_token(wrong),
        lambda: ours.stream_decoder().step(wrong),
    ]
    for action in actions:
        with pytest.raises(AndromedaError, match=f"id {wrong} is out of range; ids are 0 to 399"):
            action()


def test_tokens_and_ids_are_each_others_names(ours: Tokenizer) -> None:
    assert [ours.token_to_id(ours.id_to_token(token_id)) for token_id in range(400)] == list(range(400))
    assert ours.token_to_id("no such token") is None
    assert (ours.id_to_token(ours.eos_id), ours.id_to_token(ours.pad_id)) == ("<|endoftext|>", "<|pad|>")
    assert ours.bos_id is None
    assert [ours.id_to_token(token_id) for token_id in ours.stop_ids] == ["<|endoftext|>", "<|im_end|>"]


def _ids_in_process(tokenizer: Tokenizer) -> tuple[str, list[int]]:
    return tokenizer.sha256, tokenizer.encode_chat([{"role": "user", "content": "<|im_end|>"}])


def test_a_tokenizer_can_be_sent_to_another_process(ours: Tokenizer) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_ids_in_process, (ours,)) == _ids_in_process(ours)


# ---- other people's tokenizers -----------------------------------------------------------------------


def unigram() -> tokenizers.Tokenizer:
    """As T5 and its kin: a piece `</s>` in the vocabulary that the library finds in ordinary text."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "<", "/", "s", ">", "[", "]", "I", "N", "S", "T", "|", "▁the", "e", "t", "h"]
    tokenizer = tokenizers.Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2: pieces where it has them, bytes elsewhere, and `</s>` is what two pieces merge to."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "t", "h", "e", "▁t", "▁th", "▁the", "<", "/s>", "/", "s", ">", "s>"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("s", ">"), ("/", "s>"), ("<", "/s>")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    words = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[PAD]",
        "the",
        "rose",
        "##s",
        "s",
        "r",
        "##o",
        "##e",
        "[",
        "]",
        "cls",
        ".",
        "日",
    ]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]"])
    return tokenizer


def word_level() -> tokenizers.Tokenizer:
    words = ["<unk>", "the", "</s>", "rose"]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


def ignoring_merges() -> tokenizers.Tokenizer:
    """As Llama 3: a piece of text that is in the vocabulary is taken whole; here control tokens are in it, too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "th", "the", "<|eot_id|>", "<|begin_of_text|>"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    tokenizer.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in ("rose-hip", "    ")])
    strips = ("<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, rstrip=True) for name in strips])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


FOREIGN = {
    made.__name__: made for made in (unigram, byte_fallback, word_piece, word_level, ignoring_merges)
}  # fmt: skip


@pytest.fixture(scope="module", params=FOREIGN)
def foreign(request: pytest.FixtureRequest) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    """A tokenizer of the library, and ours made of its tokenizer.json."""
    made = FOREIGN[request.param]()
    ours = Tokenizer(made.to_str(), config={"pad_token": None})
    made.no_truncation()
    made.no_padding()
    return made, ours


@given(st.text("the ros.日é\n🙂-p", max_size=30))
def test_foreign_tokenizers_give_the_ids_and_text_of_the_library(
    foreign: tuple[tokenizers.Tokenizer, Tokenizer], text: str
) -> None:
    theirs, ours = foreign
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ours.encode_batch([text])[0] == ids
    assert ours.decode(ids) == theirs.decode(ids)


@given(text=hostile_text)
def test_foreign_tokenizers_find_no_control_token_in_text(
    foreign: tuple[tokenizers.Tokenizer, Tokenizer], text: str
) -> None:
    theirs, ours = foreign
    assert special_ids(theirs).isdisjoint(ours.encode(text + " </s> <|eot_id|> [SEP]"))


def test_the_library_alone_does_find_them() -> None:
    """Why `encode_special_tokens` is not enough."""
    found = [(unigram(), "</s>"), (byte_fallback(), "</s>"), (word_level(), "</s>"), (ignoring_merges(), "<|eot_id|>")]
    for made, text in found:
        made.encode_special_tokens = True
        assert text in made.encode(text, add_special_tokens=False).tokens


def test_the_unknown_token_still_stands_for_what_is_unknown() -> None:
    assert Tokenizer(word_level().to_str()).encode("the thorn") == [1, 0]


def test_words_added_to_a_vocabulary_are_ordinary_text() -> None:
    tokenizer = Tokenizer(ignoring_merges().to_str())
    assert tokenizer.token_to_id("rose-hip") in tokenizer.encode("a rose-hip")
    assert tokenizer.token_to_id("    ") in tokenizer.encode("\n    x")


@pytest.mark.parametrize("made", FOREIGN.values())
def test_the_ends_of_a_text_are_guessed(made: Callable[[], tokenizers.Tokenizer]) -> None:
    tokenizer = Tokenizer(made().to_str())
    assert tokenizer.id_to_token(tokenizer.eos_id) in ("</s>", "[SEP]", "<|eot_id|>")


def test_without_an_end_of_text_the_error_says_what_to_do() -> None:
    bare = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(AndromedaError, match=r"eos_token in tokenizer_config\.json"):
        _ = Tokenizer(bare.to_str()).eos_id


def test_a_hole_in_the_ids_has_no_token_and_no_text() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a")).to_str())
    assert tokenizer.vocab_size == 6
    assert tokenizer.decode([0, 3, 5]) == "a b"
    with pytest.raises(AndromedaError, match="no token has id 3"):
        tokenizer.id_to_token(3)


def test_an_added_token_that_cannot_be_kept_from_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "renamed", lambda spec, names: {**spec, "added_tokens": []})
    with pytest.raises(AndromedaError, match="added token 0 cannot be told from ordinary text"):
        Tokenizer(unigram().to_str())


# ---- streaming ---------------------------------------------------------------------------------------


def streamed(tokenizer: Tokenizer, ids: Sequence[int], skip_special: bool = True) -> list[str]:
    stream = tokenizer.stream_decoder(skip_special=skip_special)
    return [*(stream.step(token_id) for token_id in ids), stream.flush()]


@given(st.lists(st.integers(0, 399)), st.booleans())
def test_streamed_pieces_are_the_decoded_text(ours: Tokenizer, ids: list[int], skip_special: bool) -> None:
    assert "".join(streamed(ours, ids, skip_special)) == ours.decode(ids, skip_special=skip_special)


@given(st.binary())
def test_streamed_bytes_are_the_decoded_text(ours: Tokenizer, data: bytes) -> None:
    names = {byte: name for name, byte in BYTE_OF_CHARACTER.items()}
    ids = [token_id for byte in data if (token_id := ours.token_to_id(names[byte])) is not None]
    assert len(ids) == len(data)
    assert "".join(streamed(ours, ids)) == ours.decode(ids) == data.decode("utf-8", "replace")


@given(st.text(st.sampled_from("e\u0301👩\u200d🚀日本ñ\ufffd a🇫🇷")))
def test_no_character_is_broken(ours: Tokenizer, text: str) -> None:
    pieces = streamed(ours, ours.encode(text))
    assert "".join(pieces) == text
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")
    assert pieces[-1] == ""


@given(data=st.data())
def test_foreign_streams_are_the_decoded_text(
    foreign: tuple[tokenizers.Tokenizer, Tokenizer], data: st.DataObject
) -> None:
    ours = foreign[1]
    texts = st.text("the rosé日🙂.").map(ours.encode)
    ids = data.draw(st.one_of(texts, st.lists(st.integers(0, ours.vocab_size - 1))))
    skip_special = data.draw(st.booleans())
    assert "".join(streamed(ours, ids, skip_special)) == ours.decode(ids, skip_special=skip_special)


# ---- files -------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(ours: Tokenizer, tmp_path: Path) -> None:
    ours.save(tmp_path / "new" / "directory")
    again = Tokenizer.load(tmp_path / "new" / "directory")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert sorted(path.name for path in (tmp_path / "new" / "directory").iterdir()) == [
        *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    ]
    assert again.sha256 == ours.sha256
    assert again.named_tokens == ours.named_tokens
    assert again.encode_chat_with_mask(chat) == ours.encode_chat_with_mask(chat)
    alone = Tokenizer.load(tmp_path / "new" / "directory" / "tokenizer.json")
    assert alone.encode_chat(chat) == ours.encode_chat(chat)


def test_foreign_files_keep_their_meaning(foreign: tuple[tokenizers.Tokenizer, Tokenizer], tmp_path: Path) -> None:
    theirs, ours = foreign
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.sha256, again.eos_id, again.bos_id) == (ours.sha256, ours.eos_id, ours.bos_id)
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab() == theirs.get_vocab()


def write_foreign(directory: Path, config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    byte_fallback().save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_the_config_names_tokens_as_text_or_as_objects(tmp_path: Path) -> None:
    named = {"bos_token": {"content": "[INST]", "lstrip": False}, "eos_token": "<s>", "pad_token": None}
    tokenizer = Tokenizer.load(write_foreign(tmp_path, {**named, "add_bos_token": True}))
    assert tokenizer.id_to_token(tokenizer.eos_id) == "<s>"
    assert tokenizer.bos_id == tokenizer.token_to_id("[INST]")
    assert tokenizer.pad_id == tokenizer.eos_id


def test_a_token_that_only_the_config_calls_special_is_special(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_foreign(tmp_path, {"eos_token": "▁the"}))
    assert tokenizer.eos_id not in tokenizer.encode("the the")
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_templates_come_from_the_config_or_from_files(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    text = "{{ bos_token }}one"
    assert Tokenizer.load(write_foreign(tmp_path, {"chat_template": text})).apply_chat_template(chat) == "<s>one"
    named = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "three"}]
    tokenizer = Tokenizer.load(write_foreign(tmp_path, {"chat_template": named}))
    tokenizer.save(tmp_path / "again")
    for loaded in (tokenizer, Tokenizer.load(tmp_path / "again")):
        assert loaded.apply_chat_template(chat) == "two"
        assert loaded.apply_chat_template(chat, [{"name": "f"}]) == "three"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("four")
    (tmp_path / "chat_template.jinja").write_text("five")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.apply_chat_template(chat) == "five"
    assert tokenizer.apply_chat_template(chat, [{"name": "f"}]) == "four"


def test_saving_without_a_template_leaves_none_behind(ours: Tokenizer, tmp_path: Path) -> None:
    ours.save(tmp_path)
    Tokenizer(unigram().to_str()).save(tmp_path)
    with pytest.raises(AndromedaError, match="no chat template"):
        Tokenizer.load(tmp_path).encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer.json", None, "cannot be read: No such file"),
        ("tokenizer.json", b'{"model": ', "not a tokenizer.json"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8"),
        ("tokenizer_config.json", b"{", "is not JSON"),
        ("tokenizer_config.json", b"[]", "must hold a JSON object"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template must be"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', "chat_template must be"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_files_that_are_missing_or_corrupt_are_named(
    tmp_path: Path, name: str, content: bytes | None, complaint: str
) -> None:
    write_foreign(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(AndromedaError, match=f"{name}.*{complaint}"):
        Tokenizer.load(tmp_path)


def test_a_place_that_cannot_be_written_is_named(ours: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AndromedaError, match="file: the tokenizer cannot be written there"):
        ours.save(tmp_path / "file")


def test_missing_paths_and_unknown_tokens_are_named(tmp_path: Path) -> None:
    with pytest.raises(AndromedaError, match="nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(AndromedaError, match=r"tokenizer\.json: holds no token '<nil>', which .* calls eos_token"):
        Tokenizer.load(write_foreign(tmp_path, {"eos_token": "<nil>"}))


# ---- chat --------------------------------------------------------------------------------------------

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def conversation(texts: Sequence[str], role_of_system: str = "system") -> list[dict[str, Any]]:
    """Every kind of message, holding the texts in every place where a text can stand."""
    take = [texts[number % len(texts)] for number in range(9)]
    function = {"name": "weather", "arguments": {"city": take[3], take[8]: "x"}}
    call = {"id": take[7], "type": "function", "function": function}
    return [
        {"role": role_of_system, "content": take[0]},
        {"role": "user", "content": take[1], "name": take[6]},
        {"role": "assistant", "content": take[2], "tool_calls": [call]},
        {"role": "tool", "content": take[4], "tool_call_id": take[7]},
        {"role": "assistant", "content": take[5]},
        {"role": "user", "content": take[6]},
    ]


def test_our_template_writes_chatml_with_hermes_tools(ours: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": {"sky": "blue"}},
        {"role": "assistant", "content": "Blue."},
    ]
    assert ours.apply_chat_template(messages, [WEATHER]) == (
        "<|im_start|>system\nBe brief.\n\nYou can call functions. Each line between the tags describes one:\n<tools>\n"
        + json.dumps(WEATHER)
        + '\n</tools>\nTo call one, write: <tool_call>{"name": its name, "arguments": an object}</tool_call>'
        "<|im_end|>\n"
        "<|im_start|>user\nWeather?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "weather", "arguments": {"city": "Zürich"}}</tool_call>\n'
        '<tool_call>{"name": "weather", "arguments": {"city": "Zürich"}}</tool_call><|im_end|>\n'
        '<|im_start|>tool\n<tool_response>{"sky": "blue"}</tool_response><|im_end|>\n'
        "<|im_start|>assistant\nBlue.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    alone = ours.apply_chat_template(messages[1:2], add_generation_prompt=False)
    assert alone == "<|im_start|>user\nWeather?<|im_end|>\n"


@pytest.mark.parametrize("arguments", ['{"city": "Rome"}', {"city": "Rome"}])
def test_arguments_may_be_json_text_as_in_openais_api(ours: Tokenizer, arguments: object) -> None:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
    text = ours.apply_chat_template([{"role": "assistant", "content": "", "tool_calls": calls}])
    assert '"arguments": {"city": "Rome"}}</tool_call>' in text


@pytest.mark.parametrize("broken", ['{"city": ', '"Rome"', '{"city": "\\ud800"}'])
def test_arguments_that_are_no_object_stay_as_they_are(ours: Tokenizer, broken: str) -> None:
    calls = [{"name": "weather", "arguments": broken}]
    messages: list[dict[str, Any]] = [{"role": "assistant", "content": "", "tool_calls": calls}]
    assert f'"arguments": {broken}}}</tool_call>' in ours.apply_chat_template(messages)
    assert ours.decode(ours.encode_chat(messages), skip_special=False) == ours.apply_chat_template(messages)


@given(st.lists(st.sampled_from(["", "  O rose", "\n\n", "sick", "\n    of joy\n"]), min_size=1, max_size=4))
def test_a_prompt_is_the_beginning_of_the_conversation_it_leads_to(ours: Tokenizer, texts: list[str]) -> None:
    messages = conversation(texts)
    ids, mask = ours.encode_chat_with_mask(messages, [WEATHER])
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = ours.encode_chat(messages[:number], [WEATHER])
            assert ids[: len(prompt)] == prompt
            assert mask[len(prompt)]
    assert ids == ours.encode_chat(messages, [WEATHER], add_generation_prompt=False)


def test_the_mask_holds_what_the_assistant_says_and_its_end_of_turn(ours: Tokenizer) -> None:
    messages = conversation(["  indented\n"])
    ids, mask = ours.encode_chat_with_mask(messages)
    said = ours.decode([token_id for token_id, own in zip(ids, mask, strict=True) if own], skip_special=False)
    call = '<tool_call>{"name": "weather", "arguments": {"city": "  indented\\n", "  indented\\n": "x"}}</tool_call>'
    assert said == f"  indented\n\n{call}<|im_end|>  indented\n<|im_end|>"
    assert not any(ours.encode_chat_with_mask(messages[:2])[1])


HEADERS = (  # in the style of Llama 3: trims contents, a begin-of-text token, JSON with indentation
    "{{- bos_token }}"
    "{%- if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{{ '<|eot_id|>' }}{% endif %}"
    "{%- for message in messages %}"
    "{%- set head = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}"
    "{{- head + message['content'] | trim }}"
    "{%- for call in message.tool_calls or [] %}{{ call.function | tojson(ensure_ascii=True) }}{% endfor %}"
    "{{- '<|eot_id|>' }}"
    "{%- endfor %}"
    "{{- extra | join if extra }}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
BRACKETS = (  # in the style of Mistral: no system role in the turns, roles checked, plain content beside the tokens
    "{%- set ns = namespace(system='') %}{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'system' %}{%- set ns.system = message.content + '\n' %}"
    "{%- elif message.role == 'user' %}{{ '[INST] ' ~ ns.system ~ message.content.strip() ~ ' [/INST]' }}"
    "{%- set ns.system = '' %}"
    "{%- elif message.role == 'assistant' %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments.items() | list | tojson }}{% endfor %}"
    "{{ eos_token }}"
    "{%- elif message.role == 'tool' %}{{ message.content | upper | replace('A', 'B') }}"
    "{%- else %}{{ raise_exception('only known roles, please') }}{% endif %}"
    "{%- endfor %}"
)
ROLES = (  # in the style of Phi 3: a token is spelt around the role, and contents touch the tokens
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}{% continue %}{% endif %}"
    "{% set role = 'user' if message.role == 'tool' else message.role %}"
    "{{ '<|' + role + '|>' }}\n{{ message.content + '<|end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKING = (  # in the style of Qwen 3: looks into contents, drops old thoughts
    "{%- for message in messages %}"
    "{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' + content }}"
    "{%- if message.role == 'assistant' %}{% for call in message.tool_calls or [] %}"
    "\n<tool_call>\n{{ call.function | tojson }}\n</tool_call>"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml() -> tokenizers.Tokenizer:
    """As Qwen: the marks around tool calls and thoughts are added tokens that decoding shows."""
    tokenizer = tokenizers.Tokenizer.from_str(Tokenizer.train(CORPUS, 300)._canonical)
    tokenizer.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in ("<think>", "</think>")])
    return tokenizer


STYLES: dict[str, tuple[Callable[[], tokenizers.Tokenizer], str]] = {
    "headers": (ignoring_merges, HEADERS),
    "roles": (ignoring_merges, ROLES),
    "brackets": (byte_fallback, BRACKETS),
    "brackets, Unigram": (unigram, BRACKETS),
    "thinking": (chatml, THINKING),
    "ours": (chatml, default_chat_template()),
}


@pytest.fixture(scope="module", params=STYLES)
def styled(request: pytest.FixtureRequest) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    make, template = STYLES[request.param]
    made = make()
    ours = Tokenizer(made.to_str(), templates={"default": template})
    made.no_truncation()
    made.no_padding()
    return made, ours


@given(st.lists(st.text("the ros.日é\n🙂<|", max_size=9), min_size=1, max_size=3), st.booleans())
def test_ordinary_chats_have_the_ids_of_their_text(
    styled: tuple[tokenizers.Tokenizer, Tokenizer], texts: list[str], prompt: bool
) -> None:
    """The plain path: render, then let the library encode the text."""
    theirs, ours = styled
    # Where a template marks the assistant's words, no token crosses the mark: no blank next to one, then.
    messages = conversation([f"the{text}s" for text in texts])
    text = ours.apply_chat_template(messages, [WEATHER], prompt)
    assert ours.encode_chat(messages, [WEATHER], prompt) == theirs.encode(text, add_special_tokens=False).ids


@settings(max_examples=60)
@given(st.lists(hostile_text, min_size=1, max_size=4))
def test_no_text_in_a_chat_becomes_a_control_token(
    styled: tuple[tokenizers.Tokenizer, Tokenizer], texts: list[str]
) -> None:
    theirs, ours = styled
    special = special_ids(theirs)
    hostile, harmless = conversation(texts), conversation(["the"])
    hostile_tools = [{**WEATHER, texts[0]: texts[-1]}]
    skeleton = [i for i in ours.encode_chat(harmless, [WEATHER]) if i in special]
    assert [i for i in ours.encode_chat(hostile, hostile_tools, extra=texts) if i in special] == skeleton


@settings(max_examples=60)
@given(st.lists(hostile_text, min_size=1, max_size=4))
def test_a_hostile_chat_is_still_read_as_it_was_written(ours: Tokenizer, texts: list[str]) -> None:
    messages, tools = conversation(texts), [{**WEATHER, texts[0]: texts[-1]}]
    for tokenizer in (ours, Tokenizer(ignoring_merges().to_str(), templates={"default": HEADERS})):
        ids = tokenizer.encode_chat(messages, tools)
        assert tokenizer.decode(ids, skip_special=False) == tokenizer.apply_chat_template(messages, tools)


@given(st.lists(hostile_text, min_size=1, max_size=4))
def test_only_the_assistants_content_may_hold_visible_marks(ours: Tokenizer, texts: list[str]) -> None:
    messages = conversation(texts)
    marks = control_ids(ours, TOOL_TOKENS)
    harmless = [{**message, "content": "x"} if message["role"] == "assistant" else message for message in messages]
    expected = [i for i in ours.encode_chat(conversation(["x"])) if i in marks]
    assert [i for i in ours.encode_chat(harmless) if i in marks] == expected
    said = [{"role": "assistant", "content": "<tool_call>{}</tool_call><|im_end|>!"}]
    ids = ours.encode_chat(said, add_generation_prompt=False)
    found = [ours.id_to_token(i) for i in ids if i in marks | {*ours.stop_ids}]
    assert found == ["<tool_call>", "</tool_call>", "<|im_end|>"]


def test_a_template_still_sees_the_assistants_own_marks() -> None:
    tokenizer = Tokenizer(chatml().to_str(), templates={"default": THINKING})
    said = [{"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}]
    assert tokenizer.decode(tokenizer.encode_chat(said), skip_special=False) == (
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>assistant\n"
    )


TOKEN_NAMES = ["<|ab|>", "<a>", "</a>", "[a]", "<<a>>", "a<"]
junk = st.text("<|a/>[] ", max_size=3)


@st.composite
def torn_tokens(draw: st.DrawFn) -> tuple[str, str, str]:
    """A control token that stands partly in a text and partly in what a template writes before and after it."""
    name = draw(st.sampled_from(TOKEN_NAMES))
    first, last = sorted(draw(st.lists(st.integers(0, len(name)), min_size=2, max_size=2)))
    before, inside, after = name[:first], name[first:last], name[last:]
    text = draw(junk) * (first == 0) + inside + draw(junk) * (last == len(name))
    blank = st.sampled_from(["", " ", "\n "])
    return draw(junk) + before, draw(blank) + text + draw(blank), after + draw(junk)


@settings(max_examples=500)
@given(torn_tokens(), st.sampled_from([str, str.strip]))
def test_the_guard_lets_no_control_token_reach_into_a_message(
    torn: tuple[str, str, str], change: Callable[[str], str]
) -> None:
    left, text, right = torn
    guard = Guard(TOKEN_NAMES, [])
    masked = guard.mask(text)
    assert guard.resolve(masked, {}) == text
    rendered, start = left + change(masked) + right, len(left)
    stop = start + len(change(masked))
    for name in TOKEN_NAMES:
        for found in re.finditer(f"(?={re.escape(name)})", rendered):
            inside = rendered[max(start, found.start()) : max(0, min(stop, found.start() + len(name)))]
            assert inside == "" or inside.isalpha(), name


@given(st.text(" abc.,;\n{}:\"'"))
def test_the_guard_leaves_ordinary_text_alone(text: str) -> None:
    assert Guard(TOKEN_NAMES, []).mask(text) == text


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (BRACKETS, "chat template: only known roles, please"),
        ("{% if %}", "chat template, line 1: "),
        ("\n{% generation %}", "chat template, line 2: "),
        ("{{ messages[0].content + 1 }}", "chat template: TypeError: "),
        ("{{ nothing.at.all }}", "chat template: 'nothing' is undefined"),
        ("{{ nothing | tojson }}", "chat template: TypeError: .* not JSON serializable"),
        ("{{ messages.append(1) }}", "chat template: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "chat template: .*unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "chat template: .*[Rr]ange"),
        ("{{ raise_exception('two\nlines') }}", "chat template: two lines$"),
    ],
)
def test_a_templates_complaint_reaches_the_user(template: str, complaint: str) -> None:
    tokenizer = Tokenizer(byte_fallback().to_str(), templates={"default": template})
    for action in (tokenizer.apply_chat_template, tokenizer.encode_chat):
        with pytest.raises(AndromedaError, match=complaint):
            action([{"role": "stranger", "content": "hi"}])


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "no messages"),
        ([{"role": "user", "content": "x"}, {"content": "x"}], "message 2 must be an object with a role"),
        (["x"], "message 1 must be"),
        ([{"role": "user", "content": "ab\ud800"}], "lone surrogate at character 2"),
        ([{"role": "user", "content": object()}], "plain JSON values only, not object"),
        ([{"role": "poet", "content": "x"}], "no role 'poet'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "text parts only"),
    ],
)
def test_bad_messages_are_refused(ours: Tokenizer, messages: list[Any], complaint: str) -> None:
    for action in (ours.apply_chat_template, ours.encode_chat):
        with pytest.raises(AndromedaError, match=complaint):
            action(messages)


def test_a_template_that_writes_no_valid_unicode_is_refused() -> None:
    tokenizer = Tokenizer(byte_fallback().to_str(), templates={"default": r"{{ '\udc80' }}"})
    with pytest.raises(AndromedaError, match="not valid Unicode"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def test_templates_have_what_transformers_gives_them() -> None:
    template = (
        "{% generation %}\nsaid{% endgeneration %}"
        "|{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "|{{ strftime_now('%%') }}|{{ {'b': '<é>', 'a': 1} | tojson(sort_keys=true, ensure_ascii=true) }}|{{ mood }}"
    )
    tokenizer = Tokenizer(byte_fallback().to_str(), templates={"default": template})
    text = tokenizer.apply_chat_template([{"role": "user", "content": ""}], mood="calm")
    assert text == 'said|1|%|{"a": 1, "b": "<\\u00e9>"}|calm'


def test_a_mask_needs_a_template_that_marks_the_assistants_words() -> None:
    tokenizer = Tokenizer(byte_fallback().to_str(), templates={"default": BRACKETS})
    assert tokenizer.encode_chat_with_mask([{"role": "user", "content": "hi"}])[1]
    with pytest.raises(AndromedaError, match="generation"):
        tokenizer.encode_chat_with_mask([{"role": "assistant", "content": "hi"}])


@pytest.mark.parametrize(
    ("style", "stop"), [("headers", ["<|eot_id|>"]), ("roles", ["<|eot_id|>", "<|end|>"]), ("brackets", ["</s>"])]
)
def test_what_ends_a_reply_is_read_off_the_template(style: str, stop: list[str]) -> None:
    make, template = STYLES[style]
    tokenizer = Tokenizer(make().to_str(), templates={"default": template})
    assert [tokenizer.id_to_token(token_id) for token_id in tokenizer.stop_ids] == stop


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "[INST]{{ messages[1].content | upper }}"])
def test_a_template_that_does_not_show_the_reply_tells_no_end_of_turn(template: str) -> None:
    tokenizer = Tokenizer(byte_fallback().to_str(), templates={"default": template})
    assert tokenizer.stop_ids == (tokenizer.eos_id,)


def test_transformers_reads_what_we_save(ours: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = conversation(["O rose"])
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.pad_token_id == ours.pad_id
    assert theirs(VERSE).input_ids == ours.encode(VERSE)
    assert theirs.apply_chat_template(messages, tools=[WEATHER], tokenize=False) == ours.apply_chat_template(
        messages, [WEATHER], add_generation_prompt=False
    )
    ids, mask = ours.encode_chat_with_mask(messages, [WEATHER])
    encoded = theirs.apply_chat_template(messages, tools=[WEATHER], return_dict=True, return_assistant_tokens_mask=True)
    assert encoded["input_ids"] == ids
    assert encoded["assistant_masks"] == [int(own) for own in mask]


def test_where_control_tokens_overlap_the_longest_that_starts_first_counts() -> None:
    names = {"<<a>>": "1", "<a>": "2", "a>>": "3"}
    assert Guard(names, []).resolve("<<a>>, <a>>", names) == "1, 2>"


def test_more_marks_than_there_are_masks_are_refused() -> None:
    marks = [chr(code) for code in range(0x2190, 0x2BFF)]
    with pytest.raises(AndromedaError, match="different marks, 2046 at most"):
        Guard(marks, [])


def test_a_guard_without_control_tokens_masks_nothing() -> None:
    assert Guard([], []).mask("<|im_end|>") == "<|im_end|>"
