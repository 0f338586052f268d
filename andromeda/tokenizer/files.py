"""The files of a Hugging Face tokenizer: tokenizer.json, tokenizer_config.json and chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from andromeda.atomic import replace_file
from andromeda.errors import AndromedaError

# Names looked for, in this order, where no tokenizer_config.json says.
KNOWN_TOKENS = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "[BOS]", "[CLS]"),
    "eos_token": (
        *("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>", "[EOS]"),
        *("<|eot_id|>", "<|im_end|>", "<EOT>", "[SEP]"),
    ),
    "pad_token": ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
}


class Files(NamedTuple):
    """What they hold.

    Attributes:
        text: tokenizer.json.
        config: tokenizer_config.json; empty where there is none.
        templates: chat templates by name.
        source: what error messages call the tokenizer.
    """

    text: str
    config: Mapping[str, Any]
    templates: Mapping[str, str]
    source: str


def read_files(path: Path) -> Files:
    """Of a tokenizer.json alone, or of its directory.

    Raises:
        AndromedaError: a file is missing, not UTF-8 or not JSON.
    """
    if not path.is_dir():
        return Files(_read_text(path), {}, {}, str(path))
    config_path = path / "tokenizer_config.json"
    config = _read_object(config_path) if config_path.exists() else {}
    templates = _configured_templates(config.get("chat_template"), config_path)
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = _read_text(file)
    if (path / "chat_template.jinja").exists():
        templates["default"] = _read_text(path / "chat_template.jinja")
    file = path / "tokenizer.json"
    return Files(_read_text(file), config, templates, str(file))


def write_files(directory: Path, text: str, named_tokens: Mapping[str, str], templates: Mapping[str, str]) -> None:
    """Writes them for transformers' AutoTokenizer too.

    Raises:
        AndromedaError: a file cannot be written.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **dict.fromkeys(KNOWN_TOKENS),
        **named_tokens,
    }
    template = templates.get("default") if len(templates) == 1 else None
    if templates and template is None:
        config["chat_template"] = [{"name": name, "template": source} for name, source in templates.items()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if template is None:
            (directory / "chat_template.jinja").unlink(missing_ok=True)
        else:
            replace_file(directory / "chat_template.jinja", template)
        replace_file(directory / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        replace_file(directory / "tokenizer.json", text + "\n")
    except OSError as error:
        raise AndromedaError(
            f"{directory}: the tokenizer cannot be written there: {error.strerror}; free space, or choose another place"
        ) from error


def parsed(text: str, source: str) -> tokenizers.Tokenizer:
    """Raises AndromedaError for what is no tokenizer.json."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more precise
        raise AndromedaError(f"{source}: not a tokenizer.json: {error}") from error
    # How long texts are cut or filled up is a matter of their use.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def named_tokens(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], source: str) -> dict[str, str]:
    """`bos_token` and the like: what the config says, else the usual names.

    Raises:
        AndromedaError: the config names a token that the tokenizer does not hold.
    """
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


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise AndromedaError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise AndromedaError(f"{path}: must hold a JSON object")
    return value
