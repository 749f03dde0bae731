"""Words to token ids and back: one token a word or mark, so that a matrix over tokens reads like a sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence

from engine.toyland.words import MARKS, START, VOCABULARY

_PARTS = re.compile(r"<\w+>|\w+|[^\w\s]")


class Tokenizer:
    """Toyland's fixed vocabulary. `bos` begins every text; nothing ends one, and there are no line breaks."""

    def __init__(self) -> None:
        self.words = VOCABULARY
        self.ids = {word: i for i, word in enumerate(VOCABULARY)}
        self.size = len(VOCABULARY)
        self.bos: int | None = self.ids[START]
        self.eos: int | None = None
        self.newline: int | None = None

    def encode(self, text: str) -> list[int]:
        """The ids of the words of `text`, in any case and spacing. A word that Toyland lacks is a ValueError."""
        ids = []
        for word in _PARTS.findall(text.lower()):
            if word not in self.ids:
                raise ValueError(f"Toyland has no word {word[:40]!r}: try anna, ball or attic")
            ids.append(self.ids[word])
        return ids

    def prompt(self, text: str) -> list[int]:
        """`encode`, after the start token that every text of Toyland begins with."""
        ids = self.encode(text)
        return ids if ids[:1] == [self.bos] else [self.ids[START], *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, marks close to the word before: "where is the red ball? in the attic." """
        text = ""
        for piece in self.pieces(ids):
            text += piece if piece in MARKS or not text else " " + piece
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The word of each token. Raises ValueError for what is no token."""
        wrong = next((token for token in ids if not 0 <= token < self.size), None)
        if wrong is not None:
            raise ValueError(f"token must be an id from 0 to {self.size - 1}, not {wrong}")
        return [self.words[token] for token in ids]
