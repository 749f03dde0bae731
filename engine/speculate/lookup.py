"""No draft model at all: look where the last words stood before, and guess what followed them there.

"Prompt Lookup Decoding" (github.com/apoorvumang/prompt-lookup-decoding); "Inference with Reference: Lossless
Acceleration" (arXiv:2304.04487) copies from a reference in the same way. Paper -> here: max_ngram_size = `longest`,
num_pred_tokens = `length`. The longest matching end of the text counts, and its latest earlier place: what the text
did last it does again soonest. Deviation: the published code takes the earliest place.

The guesses are chosen, not drawn, so their q is sure of them; the check makes that lossless at every temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.recording import event
from engine.speculate import Dice, Draft, Drafter, Verdict, in_a_row


def follow(text: Sequence[int], *, longest: int, length: int) -> tuple[list[int], int, int]:
    """At most `length` tokens that followed the text's last n tokens before, the place where those n stand, and n.

    n is the largest up to `longest` that is found; ([], -1, 0) if not even the last token stood anywhere before.
    """
    for n in range(min(longest, len(text) - 1), 0, -1):
        end = list(text[-n:])
        for at in range(len(text) - n - 1, -1, -1):
            if list(text[at : at + n]) == end:
                return list(text[at + n : at + n + length]), at, n
    return [], -1, 0


class Lookup(Drafter):
    """At most `length` tokens, after the longest end of the text, up to `longest` tokens, that stood there before.

    The place of every n-gram is noted as the text grows, so that a draft costs some looks at a dict.
    """

    def __init__(self, *, length: int = 8, longest: int = 3, shortest: int = 1) -> None:
        if length < 1:
            raise ValueError(f"length must be a number of drafted tokens above 0, not {length}")
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest must be from 1 to longest={longest}, not {shortest}")
        self.length, self.longest, self.shortest = length, longest, shortest
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where what followed it last begins
        self._noted = 0  # tokens whose followers are known

    def draft(self, text: Sequence[int], *, room: int, temperature: float, dice: Dice) -> Draft:
        for end in range(self._noted, len(text)):  # the n-grams that end before token `end`, which follows them
            for n in range(self.shortest, min(self.longest, end) + 1):
                self._after[tuple(text[end - n : end])] = end
        self._noted = len(text)
        for n in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            start = self._after.get(tuple(text[-n:]))
            if start is not None:
                event("speculate.lookup", place=start - n, matched=n)
                return in_a_row(list(text[start : start + min(self.length, room)]))
        return in_a_row([])


class Either(Drafter):
    """Asks `first`, and `second` where the first has nothing to say: a lookup that costs nothing, then a model."""

    def __init__(self, first: Drafter, second: Drafter) -> None:
        self.first, self.second = first, second

    def draft(self, text: Sequence[int], *, room: int, temperature: float, dice: Dice) -> Draft:
        draft = self.first.draft(text, room=room, temperature=temperature, dice=dice)
        return draft if len(draft) else self.second.draft(text, room=room, temperature=temperature, dice=dice)

    def told(self, draft: Draft, verdict: Verdict, hidden: Tensor) -> None:
        self.first.told(draft, verdict, hidden)
        self.second.told(draft, verdict, hidden)
