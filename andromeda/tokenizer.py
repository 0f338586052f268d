"""Text to token ids and back: byte-level BPE, or whatever a Hugging Face tokenizer.json describes.

Text is text: a control token spelt out in it (`<|im_end|>`) is read as the characters it is made of. Control tokens
come from the code and the chat template alone.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from andromeda.atomic import replace_file
from andromeda.chat import GENERATION_END, GENERATION_START, ChatTemplate, Guard, Message, Tool, default_chat_template
from andromeda.errors import AndromedaError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
TOOL_TOKENS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# How text is cut before merging; no merge crosses a cut. In order: a word with the blank or mark before it; one digit;
# marks; blanks around a line break; other blanks, without the last one before a word.
PIECES = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|\s*[\r\n]\s*"
    r"|\s+(?!\S)"
    r"|\s+"
)

# Names looked for, in this order, where no tokenizer_config.json says.
KNOWN_TOKENS = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "[BOS]", "[CLS]"),
    "eos_token": (
        *("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>", "[EOS]"),
        *("<|eot_id|>", "<|im_end|>", "<EOT>", "[SEP]"),
    ),
    "pad_token": ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
}

MARKUP = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)
READ_CHARACTERS = 1 << 20


class StreamDecoder(Protocol):
    """Ids one at a time to text that is ready to be shown. The pieces, joined, are what `decode` gives for all ids."""

    def step(self, token_id: int) -> str:
        """Text that this id completes, often none. Raises AndromedaError for an id out of range."""

    def flush(self) -> str:
        """What is left at the end: a replacement character where the text stops inside a character."""


class Tokenizer:
    """A vocabulary with its chat template. Make one with `train` or `load`.

    Args:
        text: the contents of a tokenizer.json.
        config: the contents of tokenizer_config.json; of it the tokens by name are used (`bos_token`, `eos_token`,
            `pad_token`, ...). One of these three that it does not mention is looked for under the usual names.
        templates: chat templates by name. Without, our own serves a vocabulary that has its turn marks.
        source: what error messages call it.

    Raises:
        AndromedaError: not a tokenizer.json, or the config names a token that it does not hold.
    """

    def __init__(
        self,
        text: str,
        config: Mapping[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
        source: str = "tokenizer.json",
    ) -> None:
        self._source = source
        self._full = _parsed(text, source)
        self.named_tokens = _named_tokens(self._full, config or {}, source)
        _make_special(self._full, self.named_tokens)
        self._canonical = self._full.to_str()
        spec = json.loads(self._canonical)
        self._special, self._visible = _control_tokens(spec["added_tokens"])
        added_ids = [token["id"] for token in spec["added_tokens"]]
        self.vocab_size = 1 + max([*_model_ids(spec["model"]), *added_ids], default=-1)
        self._special_ids = frozenset(self._special.values())
        self._byte_level = _is_byte_level(spec["decoder"])
        self._plain = _PlainEncoder(spec, {**self._special, **self._visible}, source)
        if not templates and {"<|im_start|>", "<|im_end|>"} <= self._special.keys():
            templates = {"default": default_chat_template()}
        self._templates = dict(templates or {})

    def __reduce__(self) -> tuple[Any, ...]:
        """Data loading sends tokenizers to other processes; the secrets of `_PlainEncoder` are made anew there."""
        names: dict[str, Any] = {**dict.fromkeys(KNOWN_TOKENS), **self.named_tokens}
        return Tokenizer, (self._canonical, names, self._templates, self._source)

    # ---- making one ------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        tool_tokens: Sequence[str] = TOOL_TOKENS,
    ) -> Tokenizer:
        """Byte-level BPE; the same texts give the same tokenizer.json, byte for byte.

        All 256 bytes are in the vocabulary, so any text comes back exactly. Text is cut into PIECES first; figures are
        for 32,768 ids, against the cuts of Llama 3:
        * Digits stand alone, so a number's digits have the same ids wherever they stand and arithmetic can go by
          place. Word problems take 11% more tokens than with groups of three.
        * A line break with the blanks around it is one piece, apart from the marks before it: a verse ends in the same
          token after any mark, a stanza in another, and the first word of a line is the same token at any
          indentation. Verse takes 7% more tokens than with breaks glued to marks, tool calls in JSON 8% fewer.
        * Combining marks belong to their word.

        Args:
            texts: documents, or parts of them that end at a word's end.
            vocab_size: ids in all, special ones included; fewer where the texts hold no more pairs that occur twice.
            special_tokens: ids that stand for no text; `decode` leaves them out.
            tool_tokens: marks with an id each that belong to the text: one id is unmistakable to a grammar or a
                parser, and `decode` shows it, as in Hermes and Qwen.

        Raises:
            AndromedaError: a vocabulary too small for 256 bytes and the special tokens, no text, or text that is not
                valid Unicode.
        """
        merged_size = vocab_size - len({*special_tokens, *tool_tokens})
        if merged_size < 256:
            raise AndromedaError(
                f"tokenizer: vocab_size={vocab_size} is too small: 256 bytes and "
                f"{vocab_size - merged_size} special tokens need {256 + vocab_size - merged_size}"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=merged_size,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(_checked(texts), trainer)
        # Added afterwards, they are no part of the model: no merge makes them.
        tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special_tokens])
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in tool_tokens])
        return cls(tokenizer.to_str())

    @classmethod
    def train_on_files(cls, paths: Iterable[str | Path], vocab_size: int, **options: Any) -> Tokenizer:
        """`train` on UTF-8 text files, read in parts of about a million characters.

        Raises:
            AndromedaError: also for a file that is missing or not UTF-8.
        """
        return cls.train((text for path in paths for text in _read_parts(Path(path))), vocab_size, **options)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Any Hugging Face tokenizer: a tokenizer.json alone, or its directory.

        Of the directory tokenizer_config.json, chat_template.jinja and additional_chat_templates/*.jinja are read too.

        Raises:
            AndromedaError: a file is missing or corrupt.
        """
        path = Path(path)
        if not path.is_dir():
            return cls(_read_text(path), source=str(path))
        config_path = path / "tokenizer_config.json"
        config = _read_object(config_path) if config_path.exists() else {}
        templates = _configured_templates(config.get("chat_template"), config_path)
        for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
            templates[file.stem] = _read_text(file)
        if (path / "chat_template.jinja").exists():
            templates["default"] = _read_text(path / "chat_template.jinja")
        file = path / "tokenizer.json"
        return cls(_read_text(file), config, templates, source=str(file))

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, for transformers' AutoTokenizer too.

        Raises:
            AndromedaError: a file cannot be written.
        """
        directory = Path(directory)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            **dict.fromkeys(KNOWN_TOKENS),
            **self.named_tokens,
        }
        template = self._templates.get("default") if len(self._templates) == 1 else None
        if self._templates and template is None:
            config["chat_template"] = [{"name": name, "template": text} for name, text in self._templates.items()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if template is None:
                (directory / "chat_template.jinja").unlink(missing_ok=True)
            else:
                replace_file(directory / "chat_template.jinja", template)
            replace_file(directory / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            replace_file(directory / "tokenizer.json", self._full.to_str(pretty=True) + "\n")
        except OSError as error:
            raise AndromedaError(f"{directory}: the tokenizer cannot be written there: {error.strerror}") from error

    # ---- the vocabulary --------------------------------------------------------------------------

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the canonical tokenizer.json: the same before saving and after loading."""
        return hashlib.sha256(self._canonical.encode()).hexdigest()

    @property
    def eos_id(self) -> int:
        """The token that ends a text. Raises AndromedaError where there is none."""
        if "eos_token" not in self.named_tokens:
            raise AndromedaError(f"{self._source}: no token ends a text; name an eos_token in tokenizer_config.json")
        return self._special[self.named_tokens["eos_token"]]

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, where the tokenizer has one."""
        return self._special.get(self.named_tokens.get("bos_token", ""))

    @property
    def pad_id(self) -> int:
        """The token that fills up a batch; the end of text where there is no other."""
        return self._special[self.named_tokens["pad_token"]] if "pad_token" in self.named_tokens else self.eos_id

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end what a model writes: the end of text, and what the chat template puts after a reply."""
        ends = (self._special.get(self.named_tokens.get("eos_token", "")), self._end_of_turn_id())
        return tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None))

    def token_to_id(self, token: str) -> int | None:
        return self._full.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        """The token as tokenizer.json spells it. Raises AndromedaError for an id out of range."""
        self._check_range([token_id])
        token = self._full.id_to_token(token_id)
        if token is None:
            raise AndromedaError(f"{self._source}: no token has id {token_id}")
        return token

    # ---- text ------------------------------------------------------------------------------------

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text, with nothing put before or after.

        Args:
            text: valid Unicode.
            allow_special: read control tokens that are spelt out as what they stand for; for trusted text alone.

        Raises:
            AndromedaError: not a str, or not valid Unicode.
        """
        encoder = self._full if allow_special else self._plain.encoder
        try:
            return encoder.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise _bad_text(text) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        texts = list(texts)
        try:
            encodings = self._plain.encoder.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError as error:
            for number, text in enumerate(texts):
                if not isinstance(text, str) or _surrogate(text) is not None:
                    raise _bad_text(text, f" {number} of the batch") from error
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become replacement characters.

        Raises:
            AndromedaError: an id out of range.
        """
        ids = list(ids)
        self._check_range(ids)
        return self._full.decode(ids, skip_special_tokens=skip_special)

    def stream_decoder(self, *, skip_special: bool = True) -> StreamDecoder:
        """For text that is shown while it is made: never breaks a character."""
        return _ByteStream(self, skip_special) if self._byte_level else _TokenStream(self, skip_special)

    def _check_range(self, ids: Sequence[int]) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(token_id for token_id in ids if not 0 <= token_id < self.vocab_size)
            last = self.vocab_size - 1
            raise AndromedaError(f"{self._source}: token id {wrong} is out of range; ids are 0 to {last}")

    def _shown_token(self, token_id: int, skip_special: bool) -> str:
        """What `decode` makes text of: no special tokens, and nothing for an id that the vocabulary leaves out."""
        self._check_range([token_id])
        return "" if skip_special and token_id in self._special_ids else self._full.id_to_token(token_id) or ""

    # ---- chat ------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as the template writes it, to be read by people; for a model use `encode_chat`.

        Args:
            messages: `{"role": ..., "content": ...}`, as in OpenAI's API.
            tools: JSON schemas of the functions that may be called.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: further values for the template.

        Raises:
            AndromedaError: there is no template, or it refuses the conversation.
        """
        text = self._chat_template.render(messages, tools, add_generation_prompt, variables)
        return text.replace(GENERATION_START, "").replace(GENERATION_END, "")

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Ids of a conversation, in which only the template's own words can be control tokens.

        No text of a message or a tool, nor text pieced together from one and the template, is read as a control token
        (how: `Guard`; the assistant's own content may hold its visible marks, such as `<tool_call>`). The rest equals
        transformers' `apply_chat_template`, but that no token crosses the border of a `{% generation %}` block: with
        such a template the ids of a prompt and a reply are those of the prompt, followed by the reply's.
        """
        return self._encode_chat(messages, tools, add_generation_prompt, variables)[0]

    def encode_chat_with_mask(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, **variables: Any
    ) -> tuple[list[int], list[bool]]:
        """The same without the opening of a new turn, and for every id whether the assistant says it: train on those.

        Raises:
            AndromedaError: also where the template marks nothing with `{% generation %}` in spite of the assistant's
                messages.
        """
        ids, mask = self._encode_chat(messages, tools, False, variables)
        if not any(mask) and any(message["role"] == "assistant" for message in messages):
            raise AndromedaError(
                f"{self._source}: its chat template does not say which text is the assistant's; "
                "put {% generation %} ... {% endgeneration %} around it"
            )
        return ids, mask

    def _encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> tuple[list[int], list[bool]]:
        template, plain = self._chat_template, self._plain
        marked = template.render(messages, tools, add_generation_prompt, variables, self._guard)
        text = self._guard.resolve(marked, plain.names)
        text = text.replace(GENERATION_START, plain.start_name).replace(GENERATION_END, plain.end_name)
        ids: list[int] = []
        mask: list[bool] = []
        depth = 0
        for token_id in self.encode(text):
            if token_id == plain.start_id:
                depth += 1
            elif token_id == plain.end_id:
                depth -= 1
            else:
                ids.append(token_id)
                mask.append(depth > 0)
        return ids, mask

    def _end_of_turn_id(self) -> int | None:
        """The first control token after a reply, in a conversation made up for the purpose."""
        if not self._templates:
            return None
        reply = "reply 0f2b8c"
        exchange = [{"role": "user", "content": "question"}, {"role": "assistant", "content": reply}]
        try:
            text = self.apply_chat_template(exchange, add_generation_prompt=False)
        except AndromedaError:  # a template may insist on more than that; then it does not tell
            return None
        _, found, after = text.rpartition(reply)
        name = self._guard.first_control_token(after) if found else None
        return None if name is None else self._full.token_to_id(name)

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        if not self._templates:
            raise AndromedaError(f"{self._source}: no chat template; put a chat_template.jinja beside it")
        return ChatTemplate(self._templates, self.named_tokens)

    @cached_property
    def _guard(self) -> Guard:
        return Guard(self._special, self._visible)


class _PlainEncoder:
    """The same tokenizer with its control tokens under names that nobody can guess.

    So no text becomes a control token, whatever the model (`encode_special_tokens` of the library does not stop a
    Unigram model, or a BPE with ignore_merges, from finding `</s>` in its vocabulary), while a chat template's tokens
    are put in by those names, in one pass with the text around them.
    """

    def __init__(self, spec: Mapping[str, Any], control: Mapping[str, int], source: str) -> None:
        secret = secrets.token_hex(16)
        self.names = {name: f"{secret}{number:06x}" for number, name in enumerate(control)}
        self.start_name, self.end_name = f"{secret}start", f"{secret}end"
        self.encoder = tokenizers.Tokenizer.from_str(json.dumps(_renamed(spec, self.names), ensure_ascii=False))
        borders = [AddedToken(name, normalized=False, special=True) for name in (self.start_name, self.end_name)]
        self.encoder.add_special_tokens(borders)
        self.start_id, self.end_id = (self.encoder.token_to_id(name) for name in (self.start_name, self.end_name))
        expected = {self.names.get(token["content"], token["content"]): token["id"] for token in spec["added_tokens"]}
        for name, token_id in expected.items():
            if self.encoder.token_to_id(name) != token_id:
                raise AndromedaError(f"{source}: added token {token_id} cannot be told from ordinary text")


def _renamed(spec: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer.json in which some added tokens have other names, in the model's vocabulary as well."""
    model = dict(spec["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if not (left in names or right in names or left + right.removeprefix(prefix) in names)
        ]
    plainly = {"normalized": False, "single_word": False}
    added = [
        {**token, "content": names[token["content"]], **plainly} if token["content"] in names else token
        for token in spec["added_tokens"]
    ]
    return {**spec, "model": model, "added_tokens": added, "post_processor": None}


class _ByteStream:
    """Byte-level vocabularies: every id is some bytes, and UTF-8 can be decoded as it comes."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str:
        token = self._tokenizer._shown_token(token_id, self._skip_special)
        return self._decoder.decode(_token_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _TokenStream:
    """Other vocabularies: decode the ids since the last piece, behind those of the last piece.

    A run of single bytes (`<0xE2>`) is held until it ends, for one wrong byte spoils the whole run.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._shown: list[int] = []
        self._pending: list[int] = []

    def step(self, token_id: int) -> str:
        token = self._tokenizer._shown_token(token_id, self._skip_special)
        if not token:
            return ""
        self._pending.append(token_id)
        return "" if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token) else self.flush()

    def flush(self) -> str:
        before, after = (self._decode(ids) for ids in (self._shown, self._shown + self._pending))
        self._shown, self._pending = self._pending, []
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)


# ---- reading and writing -----------------------------------------------------------------------------


def _parsed(text: str, source: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more precise
        raise AndromedaError(f"{source}: not a tokenizer.json: {error}") from error
    # How long texts are cut or filled up is a matter of their use.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _named_tokens(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], source: str) -> dict[str, str]:
    """`bos_token` and the like: what the config says, else the usual names."""
    named = {}
    for name, value in config.items():
        token = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(token, str):
            if name in KNOWN_TOKENS and tokenizer.token_to_id(token) is None:
                raise AndromedaError(f"{source}: holds no token {token!r}, which tokenizer_config.json calls {name}")
            named[name] = token
    for name, candidates in KNOWN_TOKENS.items():
        known = [token for token in candidates if tokenizer.token_to_id(token) is not None]
        if name not in config and known:
            named[name] = known[0]
    return named


def _make_special(tokenizer: tokenizers.Tokenizer, named: Mapping[str, str]) -> None:
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    missing = [named[name] for name in KNOWN_TOKENS if name in named and named[name] not in added]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in missing])


def _control_tokens(added: Iterable[Mapping[str, Any]]) -> tuple[dict[str, int], dict[str, int]]:
    """Added tokens that no text may become: those that decoding hides, and marks that it shows (Qwen's `<tool_call>`).

    Words and blanks that were added to a vocabulary stay ordinary text.
    """
    special, visible = {}, {}
    for token in added:
        if token["special"]:
            special[token["content"]] = token["id"]
        elif MARKUP.fullmatch(token["content"]):
            visible[token["content"]] = token["id"]
    return special, visible


def _model_ids(model: Mapping[str, Any]) -> Iterable[int]:
    return model["vocab"].values() if isinstance(model["vocab"], dict) else range(len(model["vocab"]))


def _is_byte_level(decoder: Mapping[str, Any] | None) -> bool:
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    return [step["type"] for step in steps if step["type"] != "Fuse"] == ["ByteLevel"]


def _byte_characters() -> dict[str, int]:
    """What stands for each byte in a byte-level vocabulary: itself if it can be seen, else a character from 256 up.

    Source: GPT-2's encoder.py.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_characters()


def _token_bytes(token: str) -> bytes:
    if all(character in BYTE_OF_CHARACTER for character in token):
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    return token.encode()  # an added token, spelt as text


def _checked(texts: Iterable[str]) -> Iterator[str]:
    found = False
    for number, text in enumerate(texts):
        if not isinstance(text, str) or _surrogate(text) is not None:
            raise _bad_text(text, f" {number}")
        found = found or bool(text)
        yield text
    if not found:
        raise AndromedaError("tokenizer: there is no text to train on")


def _surrogate(text: str) -> int | None:
    found = re.search("[\ud800-\udfff]", text)
    return found.start() if found else None


def _bad_text(text: object, which: str = "") -> AndromedaError:
    if not isinstance(text, str):
        return AndromedaError(f"tokenizer: text{which} must be a str, not {type(text).__name__}")
    position = _surrogate(text)
    return AndromedaError(f"tokenizer: text{which} is not valid Unicode (a lone surrogate at character {position})")


def _configured_templates(value: Any, path: Path) -> dict[str, str]:
    """`chat_template` of a tokenizer_config.json: one template, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    except (TypeError, KeyError) as error:
        raise AndromedaError(f"{path}: chat_template must be a string or a list of name and template") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise AndromedaError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AndromedaError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def _read_parts(path: Path) -> Iterator[str]:
    """A text file in parts that end at a line's end."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while part := file.read(READ_CHARACTERS):
                yield part + file.readline()
    except OSError as error:
        raise AndromedaError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AndromedaError(f"{path}: is not UTF-8 text") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise AndromedaError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise AndromedaError(f"{path}: must hold a JSON object")
    return value
