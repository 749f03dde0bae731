"""What paging replaces: each request gets one stretch of memory, as long as it may ever become.

The allocation of systems before PagedAttention (arXiv:2309.06180), section 3.1 and figure 3. Paper -> here: "reserved"
slots = kept for tokens that will still come, "internal fragmentation" = reserved beyond the true end, "external
fragmentation" = free slots in gaps too small for the next stretch.
No tensor is here: the lengths alone decide. A request is read in the step in which it is admitted, and grows by a token
in each step after.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from engine.recording import event, labelled, site, tap

KINDS = ("used", "reserved", "internal", "external", "free")
USE = site("memory.use", f"slots of the memory by what they are good for: {', '.join(KINDS)}", low=0.0)
STRETCHES = site("memory.stretches", "of each stretch: its start, length, tokens, those it will have, and whose it is")


@dataclass(frozen=True)
class Request:
    """`prompt` tokens, `steps` new ones. A stretch of `limit` slots is reserved for it (None: for all positions of its
    prompt and `steps`). `copies` texts go on from the prompt: the i-th begins with the i-th likeliest token."""

    name: str
    prompt: tuple[int, ...]
    steps: int
    arrival: int = 0
    copies: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"prompt of {self.name!r} must hold a token at least, and it is empty")
        for name, least in (("steps", 1), ("arrival", 0), ("copies", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} of {self.name!r} must be a whole number of {least} or more, not {value!r}")
        if self.limit is not None and self.limit < self.tokens:
            raise ValueError(f"limit of {self.name!r} must be at least its {self.tokens} tokens, not {self.limit}")

    @property
    def tokens(self) -> int:
        """The most that is ever remembered: the last new token is never read."""
        return len(self.prompt) + self.steps - 1

    @property
    def names(self) -> list[str]:
        """One for each copy."""
        return [self.name] if self.copies == 1 else [f"{self.name}/{i}" for i in range(self.copies)]


@dataclass(frozen=True)
class Use:
    """All slots of a memory, by KINDS. `running` texts share them."""

    used: int
    reserved: int
    internal: int
    external: int
    free: int
    running: int

    @property
    def total(self) -> int:
        return self.used + self.reserved + self.internal + self.external + self.free

    @property
    def utilisation(self) -> float:
        """The share of the memory that is not free which holds a token."""
        taken = self.used + self.reserved + self.internal
        return self.used / taken if taken else 1.0

    def show(self, strategy: str) -> None:
        with labelled(strategy=strategy):
            tap(USE, np.array([asdict(self)[kind] for kind in KINDS], np.int32), "kind")


@dataclass(eq=False)
class _Stretch:
    name: str
    start: int
    length: int
    tokens: int
    last: int  # tokens when it is finished
    owner: int  # which text, counting all copies of all requests in the order given


class Reserved:
    """The same requests over a memory of `slots`, first come first served, each in the first gap that will do."""

    def __init__(self, requests: Sequence[Request], *, slots: int) -> None:
        for request in requests:
            if (request.limit or request.tokens) > slots:
                raise ValueError(
                    f"slots must hold the {request.limit or request.tokens} of {request.name!r}, not {slots}"
                )
        self.slots = slots
        texts = [(request, name) for request in requests for name in request.names]
        self._coming = sorted(
            ((request, name, owner) for owner, (request, name) in enumerate(texts)), key=lambda one: one[0].arrival
        )
        self._held: list[_Stretch] = []  # by start
        self.finished: dict[str, int] = {}

    @property
    def busy(self) -> bool:
        return bool(self._coming or self._held)

    def tick(self, t: int) -> Use:
        """Step t: what runs grows by a token, what is done leaves, who waits comes in."""
        for stretch in self._held:
            stretch.tokens += 1
        self._leave(t)
        while self._coming and self._coming[0][0].arrival <= t and self._enter(*self._coming[0]):
            self._coming.pop(0)
        use = self._use()
        rows = [(s.start, s.length, s.tokens, s.last, s.owner) for s in self._held]
        tap(STRETCHES, np.array(rows, np.int32).reshape(-1, 5), "request part")
        use.show("reserved")
        return use

    def _leave(self, t: int) -> None:
        for stretch in [s for s in self._held if s.tokens > s.last]:
            self._held.remove(stretch)
            self.finished[stretch.name] = t
            event("stretch.free", sequence=stretch.name, start=stretch.start, length=stretch.length)

    def _gaps(self) -> list[tuple[int, int]]:
        """Start and length of each free stretch."""
        edges = [(0, 0), *((s.start, s.length) for s in self._held), (self.slots, 0)]
        gaps = [(a + n, b - a - n) for (a, n), (b, _) in itertools.pairwise(edges)]
        return [gap for gap in gaps if gap[1]]

    def _enter(self, request: Request, name: str, owner: int) -> bool:
        length = request.limit or request.tokens
        start = next((start for start, gap in self._gaps() if gap >= length), None)
        if start is None:
            return False
        self._held.append(_Stretch(name, start, length, len(request.prompt), request.tokens, owner))
        self._held.sort(key=lambda s: s.start)
        event("stretch.allocate", sequence=name, start=start, length=length)
        return True

    def _use(self) -> Use:
        used = sum(s.tokens for s in self._held)
        last = sum(s.last for s in self._held)
        taken = sum(s.length for s in self._held)
        wanted = (self._coming[0][0].limit or self._coming[0][0].tokens) if self._coming else 0
        external = sum(gap for _, gap in self._gaps() if gap < wanted)
        return Use(used, last - used, taken - last, external, self.slots - taken - external, len(self._held))
