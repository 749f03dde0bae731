"""Continuous batching: whoever has arrived is read, all who run say their next word together, whoever is done leaves.

Orca's iteration-level scheduling on paged memory: PagedAttention (arXiv:2309.06180), sections 4.3 to 4.5. Paper ->
here: "preemption" by "recomputation" or "swapping" = `preempt`, all or nothing: a sequence loses every block or none.
In each step those who run come first: each gets a slot for the token it reads, and when no block is free the one that
came last gives all of its back. All of them read in one pass. Then, unless somebody was just sent away, those who
wait are admitted in order of arrival while their text fits, each read in a pass of its own, shared blocks left out.

    service = serve(model, Pages(blocks=12, block_size=4), [Request("a", prompt, steps=8), ...])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.caches.paged import Paged, Pages, Swapped
from engine.caches.reserved import Request, Reserved, Use
from engine.generate import checked_ids
from engine.model import Decoder
from engine.recording import event, site, step, tap

RUNNING = site("serve.running", "texts that were read in one pass")
WAITING = site("serve.waiting", "requests that have arrived and hold no memory")
SHARED = site("serve.shared", "tokens that share a slot with the same token of another text")


@dataclass(eq=False)
class _Text:
    """One text being written: `ids` are its prompt and what it said, the last one not read yet."""

    name: str
    request: Request
    ids: list[int]
    branch: int = 0  # which of the likeliest tokens it began with
    swapped: Swapped | None = None

    @property
    def done(self) -> bool:
        return len(self.ids) >= len(self.request.prompt) + self.request.steps


@dataclass
class Service:
    """What was said, when each text was finished, and what the memory looked like after each step."""

    texts: dict[str, list[int]] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)
    preempted: list[str] = field(default_factory=list)
    read: int = 0  # positions computed
    paged: list[Use] = field(default_factory=list)
    reserved: list[Use] = field(default_factory=list)


@torch.inference_mode()
def serve(
    model: Decoder,
    pages: Pages,
    requests: Sequence[Request],
    *,
    preempt: str = "recompute",
    beside: Reserved | None = None,
) -> Service:
    """Greedy texts of all requests. `beside` serves the same requests by reservation, for its counts."""
    _check(model, pages, requests, preempt)
    service = Service()
    waiting = [_Text(r.name, r, list(r.prompt)) for r in sorted(requests, key=lambda r: r.arrival)]
    running: list[_Text] = []
    t = 0
    while waiting or running or (beside is not None and beside.busy):
        sent_away = _make_room(pages, running, waiting, service, preempt)
        if running:
            rows = _read(model, pages, [text.name for text in running], [text.ids[-1:] for text in running])
            service.read += len(running)
            for text, logits in zip(running, rows, strict=True):
                text.ids.append(int(logits.argmax()))
        tap(RUNNING, len(running), "")
        _finish(pages, running, service, t)
        while waiting and waiting[0].request.arrival <= t and not sent_away:
            text = waiting[0]
            if not _admit(model, pages, text, running, service):
                break
            waiting.pop(0)
            _finish(pages, running, service, t)
        tap(WAITING, sum(text.request.arrival <= t for text in waiting), "")
        service.paged.append(_use(pages))
        service.paged[-1].show("paged")
        pages.show()
        if beside is not None:
            service.reserved.append(beside.tick(t))
        step()
        t += 1
    return service


def _make_room(pages: Pages, running: list[_Text], waiting: list[_Text], service: Service, preempt: str) -> bool:
    """Give every running text a slot for its next token; says whether somebody had to go for it."""
    sent_away = False
    for text in list(running):
        while text in running:
            if pages.needs(text.name, 1) <= len(pages.pool.free):
                pages.append(text.name, text.ids[-1:])
                break
            last = running.pop()  # it has no slot yet: slots are given in the same order
            sent_away = True
            service.preempted.append(last.name)
            event("serve.preempt", sequence=last.name, way=preempt, tokens=pages.table(last.name).written)
            if preempt == "swap":
                last.swapped = pages.swap_out(last.name)
            else:
                pages.close(last.name)
            waiting.insert(0, last)
    return sent_away


def _admit(model: Decoder, pages: Pages, text: _Text, running: list[_Text], service: Service) -> bool:
    """Bring a waiting text in if its tokens fit; says whether they did."""
    free = len(pages.pool.free)
    if text.swapped is not None:
        if sum(block is not None for block in text.swapped.table.blocks) > free:
            return False
        pages.swap_in(text.name, text.swapped)
        text.swapped = None
        running.append(text)
        return True
    if pages.cost(text.ids) > free:
        return False
    begun = len(text.ids) > len(text.request.prompt)
    name = text.name if begun else text.request.names[0]
    spared = pages.open(name, text.ids)
    pages.append(name, text.ids[spared:])
    event("serve.admit", sequence=name, tokens=len(text.ids), spared=spared)
    [logits] = _read(model, pages, [name], [text.ids[spared:]])
    service.read += len(text.ids) - spared
    if begun:
        text.ids.append(int(logits.argmax()))
        running.append(text)
        return True
    likeliest = logits.topk(text.request.copies).indices.tolist()
    for branch, (child, token) in enumerate(zip(text.request.names, likeliest, strict=True)):
        if branch:
            pages.fork(name, child)
            event("serve.fork", sequence=name, child=child)
        running.append(_Text(child, text.request, [*text.ids, token], branch))
    return True


def _read(model: Decoder, pages: Pages, names: list[str], ids: list[list[int]]) -> Tensor:
    """The logits [N, V] after the next tokens of each text, all in one pass."""
    column = torch.tensor(ids, device=model.embed.weight.device)  # N T
    return model.logits(model.hidden(column, cache=Paged(pages, names))[:, -1])


def _finish(pages: Pages, running: list[_Text], service: Service, t: int) -> None:
    for text in [text for text in running if text.done]:
        running.remove(text)
        pages.close(text.name)
        service.texts[text.name] = text.ids[len(text.request.prompt) :]
        service.finished[text.name] = t
        event("serve.finish", sequence=text.name)


def _use(pages: Pages) -> Use:
    """Every block in use has its live slots; the others of it are what paging wastes."""
    used, blocks = sum(pages.live()), pages.pool.blocks - len(pages.pool.free)
    size = pages.pool.block_size
    tap(SHARED, sum(table.live for table in pages.tables.values()) - used, "")
    return Use(used, 0, blocks * size - used, 0, len(pages.pool.free) * size, len(pages.tables))


def _check(model: Decoder, pages: Pages, requests: Sequence[Request], preempt: str) -> None:
    if preempt not in ("recompute", "swap"):
        raise ValueError(f'preempt must be "recompute" or "swap", not {preempt!r}')
    names = [name for request in requests for name in {request.name, *request.names}]
    if not names or len(set(names)) < len(names) or set(names) & set(pages.tables):
        raise ValueError(f"requests must have different names, none of them open, one at least, not {names}")
    for request in requests:
        checked_ids(request.prompt, model.shape.vocab)
        pages.check(request.tokens)
        if request.tokens > model.shape.max_positions:
            raise ValueError(
                f"{request.name!r} needs {request.tokens} positions, and the model has "
                f"max_positions={model.shape.max_positions}"
            )
        if request.copies > model.shape.vocab:
            raise ValueError(f"copies of {request.name!r} must be at most {model.shape.vocab}, not {request.copies}")
