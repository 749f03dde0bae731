"""The whole loop: ask a drafter, check its guesses in one pass of the target, keep what is true, and again.

"Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192), section 2.3, for chains and trees alike.

    for token in speculate(target, ids, steps=40, drafter=Chain(small, length=4)): ...

A recording gets one step a pass of the target: the prompt in step 0, whose pass gives one token, then a round each.
A round gives one token at least, and one more for each accepted guess. As in `generate`, the last new token is never
read, and a step ends when the caller asks for the token after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.caches.full import Full
from engine.generate import MULTIPLICATIONS, ROWS, TOKEN, checked_ids, multiplications
from engine.recording import event, labelled, recording_on, site, step, tap
from engine.speculate import ROOT, Dice, Draft, Drafter, Verdict, law, rejected, sure_of
from engine.speculate.chain import verify as verify_chain
from engine.speculate.tree import Branches, tree_mask, tree_positions
from engine.speculate.tree import verify as verify_tree

if TYPE_CHECKING:
    from engine.model import Decoder

SHOWN = 16  # words of the laws that are tapped: a vocabulary has tens of thousands
UNSEEN, ACCEPTED, REJECTED = 0, 1, 2

NODES = site("speculate.tokens", "the guessed tokens, node by node")
PARENTS = site("speculate.parents", "the node that each guess comes after; -1: the text itself")
OUTCOME = site("speculate.outcome", "what became of each guess: 0 never looked at, 1 accepted, 2 rejected")
NODE_P = site("speculate.p", "probability of each guess under the target, after its parent", symbol="p", low=0.0,
              high=1.0)  # fmt: skip
NODE_Q = site("speculate.q", "probability with which the drafter made each guess", symbol="q", low=0.0, high=1.0)
MASK = site("speculate.mask", "which of the rows of the check see which: the last token of the text, then the guesses",
            low=0.0, high=1.0)  # fmt: skip
POSITIONS = site("speculate.positions", "the place in the text at which each row of the check stands")
WORDS = site("speculate.law.ids", "words of one place of the round: where a guess was rejected first, else the first")
LAW_P = site("speculate.law.p", "their probabilities under the target", symbol="p", low=0.0, high=1.0)
LAW_Q = site("speculate.law.q", "their probabilities under the drafter", symbol="q", low=0.0, high=1.0)
LAW_REST = site("speculate.law.rest", "what is left of p once that guess was rejected", symbol="norm(max(0, p − q))",
                low=0.0, high=1.0)  # fmt: skip
GIVEN = site("speculate.given", "tokens that this pass of the target gave", low=0.0)
RATE = site("speculate.acceptance", "guesses accepted of those looked at, so far", symbol="α", low=0.0, high=1.0)
DRAFT_SECONDS = site("speculate.draft.seconds", "time that the drafter took", unit="s", low=0.0)
TARGET_SECONDS = site("speculate.target.seconds", "time that the target and the check took", unit="s", low=0.0)


def speculate(
    model: Decoder,
    ids: Tensor | Sequence[int],
    *,
    steps: int,
    drafter: Drafter,
    cache: Full | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    dice: Dice | None = None,
) -> Iterator[int]:
    """Yield `steps` tokens after the prompt `ids`, [N] or [1, N], by the law of `model` alone: at temperature 0 the
    very tokens of `generate`. `cache` must be empty or absent; at the end it has read all but the last token.

    Raises ValueError at the call, not at the first token.
    """
    prompt = checked_ids(ids, model.shape.vocab).tolist()
    if steps < 1:
        raise ValueError(f"steps must be a number of tokens above 0, not {steps}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or a number above, not {temperature}")
    memory = Full() if cache is None else cache
    if not isinstance(memory, Full) or memory.seen:
        raise ValueError(f"cache must be an empty Full one, since guesses are taken back, not {type(memory).__name__}")
    if len(prompt) + steps - 1 > model.shape.max_positions:
        raise ValueError(
            f"{len(prompt)} tokens and {steps} new ones need {len(prompt) + steps - 1} positions, "
            f"and the model has max_positions={model.shape.max_positions}"
        )
    return _tokens(model, prompt, steps, drafter, memory, temperature, dice or Dice(seed))


def _tokens(
    model: Decoder, prompt: list[int], steps: int, drafter: Drafter, cache: Full, temperature: float, dice: Dice
) -> Iterator[int]:
    text, left = list(prompt), steps
    looked_at = agreed = 0
    while left:
        # Not around the yields: inference mode belongs to the thread, and would leak to whoever asks for tokens.
        with torch.inference_mode():
            start = time.perf_counter()
            draft = Draft()
            if cache.seen and left > 1:
                with labelled(by="draft"):  # else its attention would be taken for the target's
                    draft = drafter.draft(text, room=left - 1, temperature=temperature, dice=dice)
            drafted = time.perf_counter()
            unread = len(text) - cache.seen
            with labelled(by="target"):
                verdict, laws, hidden = check(model, text, draft, cache, temperature=temperature, dice=dice)
            checked = time.perf_counter()
            new = [*(draft.tokens[node] for node in verdict.accepted), verdict.token]
            looked_at += len(verdict.accepted) + len(verdict.rejected)
            agreed += len(verdict.accepted)
            _show(model, text, unread, draft, verdict, laws, len(text) + len(draft))
            tap(DRAFT_SECONDS, drafted - start, "")
            tap(TARGET_SECONDS, checked - drafted, "")
            tap(RATE, agreed / looked_at if looked_at else float("nan"), "")
            text += new
            left -= len(new)
            drafter.told(draft, verdict, hidden)
        yield from new
        step()


def check(
    model: Decoder, text: Sequence[int], draft: Draft, cache: Full, *, temperature: float, dice: Dice
) -> tuple[Verdict, Tensor, Tensor]:
    """One pass of the target over what it has not read of `text` and over the guesses, and what came of them.

    Gives the verdict, the laws [1 + n, V] after the text and after each guess, and the hidden rows of the tokens that
    the cache now holds more: those of the text and the accepted guesses.
    """
    start, unread = cache.seen, list(text[cache.seen :])
    before = dict(cache.states)  # of recurrent layers: they cannot take a token back
    ids = torch.tensor([[*unread, *draft.tokens]], device=model.embed.weight.device)
    linear = draft.is_chain
    hidden = model.hidden(ids, cache=cache if linear else Branches(cache, _rows(draft, len(unread))))[0]
    laws = law(model.logits(hidden[len(unread) - 1 :]), temperature=temperature)  # 1+n V
    verdict = (verify_chain if linear else verify_tree)(draft, laws, dice=dice)
    kept = [*range(len(unread)), *(len(unread) + node for node in verdict.accepted)]
    if cache.states and len(kept) < len(hidden):
        cache.states.clear()
        cache.crop(start)
        cache.states.update(before)
        model.hidden(ids[:, kept], cache=cache)
    else:
        cache.keep(start, kept)
    return verdict, laws, hidden[kept]


def _rows(draft: Draft, unread: int) -> list[int]:
    """The parents of all rows of a pass: the unread text is a chain, and the guesses hang on its last token."""
    return [*range(ROOT, unread - 1), *(unread - 1 if p == ROOT else unread + p for p in draft.parents)]


def _show(
    model: Decoder, text: list[int], unread: int, draft: Draft, verdict: Verdict, laws: Tensor, keys: int
) -> None:
    """Tap what this pass did: `text` is what stood before it, of which `unread` tokens were read in it."""
    new = [*(draft.tokens[node] for node in verdict.accepted), verdict.token]
    rows = unread + len(draft)
    event(
        "speculate.round",
        drafted=len(draft),
        accepted=[draft.tokens[node] for node in verdict.accepted],
        rejected=[draft.tokens[node] for node in verdict.rejected],
        token=verdict.token,
        corrected=verdict.corrected,
    )
    tap(TOKEN, np.array([*text[len(text) - unread + 1 :], *new], np.int64), "query")
    tap(GIVEN, len(new), "")
    tap(ROWS, rows, "")
    if recording_on(MULTIPLICATIONS):
        tap(MULTIPLICATIONS, np.array(multiplications(model, rows=rows, keys=keys), np.float64), "part")
    if not len(draft):
        return
    outcome = np.full(len(draft), UNSEEN, np.int8)
    outcome[verdict.accepted] = ACCEPTED
    outcome[verdict.rejected] = REJECTED
    tap(NODES, np.array(draft.tokens, np.int32), "node")
    tap(PARENTS, np.array(draft.parents, np.int32), "node")
    tap(OUTCOME, outcome, "node")
    laws_of = [draft.law_of(node) for node in range(len(draft))]
    sure = zip(laws_of, draft.tokens, strict=True)
    tap(NODE_P, np.array([float(laws[1 + p, t]) for p, t in zip(draft.parents, draft.tokens, strict=True)]), "node")
    tap(NODE_Q, np.array([1.0 if q is None else float(q[token]) for q, token in sure]), "node")
    parents = [ROOT, *(p + 1 for p in draft.parents)]
    if recording_on(MASK):
        tap(MASK, tree_mask(parents), "row key")
    tap(POSITIONS, tree_positions(parents, seen=len(text) - 1).int(), "row")
    if recording_on(WORDS) or recording_on(LAW_P) or recording_on(LAW_Q) or recording_on(LAW_REST):
        _show_place(draft, verdict, laws)


def _show_place(draft: Draft, verdict: Verdict, laws: Tensor) -> None:
    node = verdict.rejected[0] if verdict.rejected else 0
    p, token = laws[1 + draft.parents[node]], draft.tokens[node]
    for earlier in draft.children(draft.parents[node]):
        if earlier < node:
            p = rejected(p, draft.tokens[earlier], draft.law_of(earlier))
    given = draft.law_of(node)
    q = sure_of(token, len(p)) if given is None else given
    words = torch.maximum(p, q).topk(min(SHOWN, len(p))).indices
    tap(WORDS, words.int(), "candidate")
    tap(LAW_P, p[words], "candidate")
    tap(LAW_Q, q[words], "candidate")
    tap(LAW_REST, rejected(p, token, given)[words], "candidate")
