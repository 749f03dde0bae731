"""Text to token ids and back, by a Hugging Face `tokenizer.json`.

Byte-level BPE (GPT-2, section 2.2): text is UTF-8 bytes, each byte one of 256 printable letters, and letters
are merged in the order in which training found them. A character may then be spread over several tokens, so
a single token need not be text: `pieces` shows such bytes as `\\xe2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as HuggingFaceTokenizer

from engine.weights import ModelUnavailable


class Tokenizer:
    """A vocabulary in use. `bos`, `eos` and `newline` are token ids, or None where the vocabulary has none.

    `size` counts the tokens; `prompt` adds the `bos` that some models were trained to see first.
    """

    def __init__(self, inner: HuggingFaceTokenizer, *, bos: int | None = None, eos: int | None = None) -> None:
        self.inner = inner
        self.bos = bos
        self.eos = eos
        self.size: int = inner.get_vocab_size()
        self.special = {token for token, added in inner.get_added_tokens_decoder().items() if added.special}
        self._bytes = _byte_letters() if "ByteLevel" in repr(inner.decoder) else {}
        newline = self.encode("\n")
        self.newline = newline[-1] if newline else None
        self._starts_with_bos = bos is not None and inner.encode("a").ids[:1] == [bos]

    @classmethod
    def from_file(cls, path: Path, *, bos: int | None = None, eos: int | None = None) -> Tokenizer:
        """Read a `tokenizer.json`. Raises ModelUnavailable."""
        try:
            inner = HuggingFaceTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a file that it cannot make sense of
            raise ModelUnavailable(f"{path} is missing or no tokenizer ({error}).") from error
        inner.no_truncation()
        inner.no_padding()
        return cls(inner, bos=bos, eos=eos)

    def encode(self, text: str) -> list[int]:
        """The ids of `text` and nothing added. Lone surrogates, which no UTF-8 can hold, become `?`."""
        return self.inner.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def prompt(self, text: str) -> list[int]:
        """`encode`, after the `bos` token when the model expects one at the start of a text."""
        return ([self.bos] if self._starts_with_bos and self.bos is not None else []) + self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included; bytes that are no UTF-8 become `\ufffd`."""
        return self.inner.decode(list(ids), skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token reads as on its own, for display: part of a character shows as its bytes, `\\xe2`."""
        return [self._piece(token) for token in ids]

    def _piece(self, token: int) -> str:
        letters = self.inner.id_to_token(token)
        if letters is None:
            raise ValueError(f"token must be an id below {self.size}, not {token}")
        if token in self.special or not all(letter in self._bytes for letter in letters):
            return letters.replace("\u2581", " ")  # SentencePiece writes a space as a low line
        return bytes(self._bytes[letter] for letter in letters).decode("utf-8", "backslashreplace")


def _byte_letters() -> dict[str, int]:
    """Which byte each printable letter of byte-level BPE stands for, as in GPT-2's `bytes_to_unicode`."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
