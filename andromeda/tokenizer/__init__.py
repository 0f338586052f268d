"""Text to token ids and back: byte-level BPE, or whatever a Hugging Face tokenizer.json describes.

tokenizer.py is what others use. It stands on training.py (texts to a vocabulary), files.py (the files of a tokenizer),
control.py (no text becomes a control token), extension.py (tokens that are added) and streaming.py (text while its ids
are made).
"""

from andromeda.tokenizer.streaming import StreamDecoder
from andromeda.tokenizer.tokenizer import Tokenizer
from andromeda.tokenizer.training import SPECIAL_TOKENS, TOOL_TOKENS

__all__ = ["SPECIAL_TOKENS", "TOOL_TOKENS", "StreamDecoder", "Tokenizer"]
