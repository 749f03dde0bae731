"""A pool of blocks: who is free, how many tables point to each, and which text each full block ends.

"Efficient Memory Management for Large Language Model Serving with PagedAttention" (arXiv:2309.06180), section 4.3.
Paper -> here: reference count = `refs`, free blocks = `free`. As in vLLM a block that is given back keeps its text and
can be found by it until it is given away again; the free list is a queue, so that this takes as long as it can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from engine.recording import event


class ExhaustedError(RuntimeError):
    """No block is free, until another sequence gives some back."""


class Pool:
    """`blocks` blocks of `block_size` slots: who is free, how many tables point to each, and which text it holds."""

    def __init__(self, blocks: int, *, block_size: int) -> None:
        for name, value in (("blocks", blocks), ("block_size", block_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
        self.blocks, self.block_size = blocks, block_size
        self.refs = [0] * blocks
        self.free = dict.fromkeys(range(blocks))  # in the order in which they will be given away
        self._text: dict[int, bytes] = {}  # full block -> hash of all text up to its end
        self._block: dict[bytes, int] = {}

    def allocate(self, owner: str) -> int:
        """A block for one table, whatever it held is lost."""
        if not self.free:
            raise ExhaustedError(f"all {self.blocks} blocks of {self.block_size} tokens are in use")
        block = next(iter(self.free))
        del self.free[block]
        self.forget(block)
        self.refs[block] = 1
        event("block.allocate", block=block, sequence=owner)
        return block

    def share(self, block: int, owner: str) -> None:
        """One more table points to `block`, which may have been free and not given away yet."""
        self.free.pop(block, None)
        self.refs[block] += 1
        event("block.share", block=block, sequence=owner, refs=self.refs[block])

    def release(self, block: int, owner: str) -> bool:
        """One table less; says whether the block came free."""
        self.refs[block] -= 1
        if self.refs[block]:
            return False
        self.free[block] = None
        event("block.free", block=block, sequence=owner)
        return True

    def seal(self, block: int, text: bytes) -> None:
        """`block` is full, and `text` is the hash of all up to its end. The first block of a text is the one found."""
        if text not in self._block:
            self._block[text], self._text[block] = block, text

    def forget(self, block: int) -> None:
        text = self._text.pop(block, None)
        if text is not None:
            del self._block[text]

    def find(self, text: bytes) -> int | None:
        return self._block.get(text)


def chained(before: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a text whose last block is `tokens`, and `before` the hash of what precedes it."""
    return hashlib.blake2b(before + b"|" + ",".join(map(str, tokens)).encode(), digest_size=16).digest()
