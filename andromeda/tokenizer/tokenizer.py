"""A vocabulary with its chat template: text and conversations to token ids, and ids to text.

Text is text: a control token spelt out in it (`<|im_end|>`) is read as the characters it is made of. Control tokens
come from the code and the chat template alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from andromeda.chat import GENERATION_END, GENERATION_START, ChatTemplate, Guard, Message, Tool, default_chat_template
from andromeda.errors import AndromedaError
from andromeda.tokenizer.control import PlainEncoder, control_tokens, renamed
from andromeda.tokenizer.extension import extends, with_tokens
from andromeda.tokenizer.files import KNOWN_TOKENS, named_tokens, parsed, read_files, write_files
from andromeda.tokenizer.pieces import PieceEncoder, cuts_as_ours
from andromeda.tokenizer.streaming import ByteStream, StreamDecoder, TokenStream, is_byte_level, spelt_bytes
from andromeda.tokenizer.training import SPECIAL_TOKENS, TOOL_TOKENS, TURN_TOKENS, check_text, train_bpe


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
        self._full = parsed(text, source)
        self.named_tokens = named_tokens(self._full, config or {}, source)
        self._make_special()
        self._canonical = self._full.to_str()
        spec = json.loads(self._canonical)
        self._special, self._visible = control_tokens(spec["added_tokens"])
        self.vocab_size = 1 + max(self._full.get_vocab().values(), default=-1)
        self._special_ids = frozenset(self._special.values())
        self._byte_level = is_byte_level(spec["decoder"])
        control = {**self._special, **self._visible}
        self._plain = PlainEncoder(spec, control, source)
        self._pieces = PieceEncoder(self._plain.encoder) if cuts_as_ours(spec, control) else None
        if not templates and self._special.keys() >= set(TURN_TOKENS):
            templates = {"default": default_chat_template()}
        self._templates = dict(templates or {})

    def __reduce__(self) -> tuple[Any, ...]:
        """Data loading sends tokenizers to other processes; the secrets of `PlainEncoder` are made anew there."""
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
        """Byte-level BPE (how: `train_bpe`); the same texts give the same tokenizer.json, byte for byte.

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
        return cls(train_bpe(texts, vocab_size, special_tokens, tool_tokens).to_str())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Any Hugging Face tokenizer: a tokenizer.json alone, or its directory.

        Of the directory tokenizer_config.json, chat_template.jinja and additional_chat_templates/*.jinja are read too.

        Raises:
            AndromedaError: a file is missing or corrupt.
        """
        return cls(*read_files(Path(path)))

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, for transformers' AutoTokenizer too.

        Raises:
            AndromedaError: a file cannot be written.
        """
        write_files(Path(directory), self._full.to_str(pretty=True), self.named_tokens, self._templates)

    def for_chat(self) -> Tokenizer:
        """The same with our chat template, and its control tokens behind those that are there.

        Raises:
            AndromedaError: it has a chat template.
        """
        if self._templates:
            raise AndromedaError(f"{self._source}: has a chat template already; leave it at that")
        text = with_tokens(self._canonical, TURN_TOKENS, TOOL_TOKENS, self._source)
        named = {**dict.fromkeys(KNOWN_TOKENS), **self.named_tokens}
        return Tokenizer(text, named, {"default": default_chat_template()}, self._source)

    def extends(self, other: Tokenizer) -> bool:
        """Whether it is another, or another with control tokens added behind its own."""
        return self.sha256 == other.sha256 or extends(self._canonical, other._canonical)

    def _make_special(self) -> None:
        """Tokens that only the config calls special."""
        added = {token.content for token in self._full.get_added_tokens_decoder().values() if token.special}
        named = (self.named_tokens[name] for name in KNOWN_TOKENS if name in self.named_tokens)
        missing = [AddedToken(token, normalized=False, special=True) for token in named if token not in added]
        self._full.add_special_tokens(missing)

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

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that no text becomes: of control tokens, those among them that decoding shows too (`<tool_call>`)."""
        return frozenset([*self._special.values(), *self._visible.values()])

    def plain_json(self) -> str:
        """A tokenizer.json with the same ids, for libraries that would find control tokens in a text.

        All of them are special there, under names that nobody can guess.
        """
        spec = renamed(json.loads(self._canonical), self._plain.names)
        for token in spec["added_tokens"]:
            token["special"] = token["id"] in self.control_ids
        return json.dumps(spec, ensure_ascii=False)

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
            # By the batch, as the library does that without Python's lock, and without offsets: faster by half.
            return encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            check_text(text)
            raise

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts: piece by piece where that can be, else by the library on all cores."""
        texts = list(texts)
        found = [self._pieces.encode(text) if self._pieces and isinstance(text, str) else None for text in texts]
        others = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        try:
            encodings = iter(self._plain.encoder.encode_batch_fast(others, add_special_tokens=False))
        except TypeError:
            for number, text in enumerate(texts):
                check_text(text, f" {number} of the batch")
            raise
        return [next(encodings).ids if ids is None else ids for ids in found]

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
        token = partial(self._shown_token, skip_special=skip_special)
        if self._byte_level:
            return ByteStream(token)
        return TokenStream(token, partial(self._full.decode, skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, a control token for its name; often a part of a character alone.

        Raises:
            AndromedaError: an id out of range.
        """
        token = self.id_to_token(token_id)
        if self._byte_level:
            return spelt_bytes(token)
        single = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
        return bytes.fromhex(single[1]) if single else self.decode([token_id], skip_special=False).encode()

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
