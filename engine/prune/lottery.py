r"""The lottery ticket: in a network that trains well hides a small one that trains as well, if it starts where it did.

Frankle and Carbin (arXiv:1803.03635), section 1 and the iterative strategy with resetting of section 2: train; prune
the share p of the smallest weights; set those that are left to their first values; again.
Paper -> here: θ_0 = `start`, m = masks, p = share, the winning ticket = θ_0 ⊙ m = `rewound`.

    sparsity after n rounds = 1 - (1 - p)^n

Contrasts: the same masks on other first values ("reinit"), and masks shuffled in each layer on θ_0 ("shuffled").
Shapes: masks as in `engine.prune`. Errors: ValueError for a share not between 0 and 1, rounds below 1, scope unknown.
Deviations: how many weights stay is rounded from (1 - p)^n of all, so that rounding does not add up. All layers lose
the same share; the paper spares its last layer. Every round trains in full, and nothing is stopped early.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.prune import Masks, apply, check_share, enforce, everything, holding, matrices, sparsity
from engine.prune.magnitude import SCOPES, lowest_pruned
from engine.recording import event, labelled, site, step, tap

Make = Callable[[int], nn.Module]
"""Makes the untrained network of a seed."""
Train = Callable[[nn.Module, Callable[[nn.Module], None] | None], object]
"""Trains a network in place, calling its second argument after each step; the same texts in the same order."""
Quality = Callable[[nn.Module], float]

SPARSITY = site("lottery.sparsity", "the share of weights pruned in this round", symbol="1 − (1 − p)ⁿ",
                low=0.0, high=1.0)  # fmt: skip
QUALITY = site("lottery.quality", "how good the trained network is; strategy says which", low=0.0)


@dataclass(frozen=True)
class Round:
    """One round: the masks that it trained with, and how good each way of starting became."""

    number: int
    masks: Masks
    sparsity: float
    quality: dict[str, float]  # "ticket", and where asked for "reinit" and "shuffled"


def first_values(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's parameters and buffers as they are, in memory of their own."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def rewound(model: nn.Module, start: Masks, masks: Masks) -> nn.Module:
    """Set `model` itself back to `start` where the masks keep, and to zero elsewhere."""
    model.load_state_dict(dict(start))
    enforce(model, masks)
    return model


def next_masks(model: nn.Module, masks: Masks, *, keep: float, scope: str = "layer") -> dict[str, Tensor]:
    """Masks that keep the share `keep` of all weights: the largest of a trained model among those kept so far."""
    check_share(keep, name="keep")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, not {scope!r}")
    # Below every magnitude, so that what is gone stays gone even where a survivor is exactly zero.
    worth = {name: w.abs().masked_fill(~masks[name], -1.0) for name, w in matrices(model).items()}
    return lowest_pruned(worth, sparsity=1 - keep, scope=scope)


def shuffled(masks: Masks, *, seed: int) -> dict[str, Tensor]:
    """As many weights kept in each layer, in places drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator).to(mask.device)].view(mask.shape)
        for name, mask in masks.items()
    }


@torch.inference_mode(False)  # what was made in it could not be trained
def draw(
    make: Make,
    train: Train,
    quality: Quality,
    *,
    seed: int,
    rounds: int,
    share: float = 0.2,
    scope: str = "layer",
    contrasts: Sequence[str] = ("reinit", "shuffled"),
) -> list[Round]:
    """Round 0 trains the whole network, each later one a smaller ticket; one step of the recording a round.

    Contrasts are trained in every round but the first, with seeds that follow from `seed`.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be a number above 0, not {rounds}")
    if isinstance(share, bool) or not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, not {share}")
    if unknown := set(contrasts) - {"reinit", "shuffled"}:
        raise ValueError(f'contrasts must be "reinit" or "shuffled", not {sorted(unknown)}')
    model = make(seed)
    start = first_values(model)
    masks: Masks = everything(model)
    done: list[Round] = []
    for number in range(rounds + 1):
        found: dict[str, float] = {}
        with labelled(strategy="ticket"):
            apply(rewound(model, start, everything(model)), masks)  # for its taps: the first values, and those kept
        rewound(model, start, masks)
        event("lottery.rewound", round=number, kept=sum(int(mask.sum()) for mask in masks.values()))
        train(model, holding(masks))
        found["ticket"] = quality(model)
        for name in contrasts if number else ():
            other = make(seed + 1000 * number + 1) if name == "reinit" else make(seed)
            worn = masks if name == "reinit" else shuffled(masks, seed=seed + 1000 * number)
            enforce(other, worn)
            train(other, holding(worn))
            found[name] = quality(other)
        for name, value in found.items():
            tap(SPARSITY, sparsity(masks), "", strategy=name)
            tap(QUALITY, value, "", strategy=name)
        step(label=f"round {number}")
        done.append(Round(number, masks, sparsity(masks), found))
        masks = next_masks(model, masks, keep=(1 - share) ** (number + 1), scope=scope)
    return done


def compare(
    make: Make, train: Train, quality: Quality, *, seeds: Sequence[int], rounds: int, share: float = 0.2,
    scope: str = "layer",
) -> dict[int, list[Round]]:  # fmt: skip
    """`draw` for each seed: whether the ticket beats its contrasts is a question for several."""
    if not len(seeds):
        raise ValueError("seeds must hold one seed at least, and is empty")
    found = {}
    for seed in seeds:
        with labelled(seed=seed):
            found[seed] = draw(make, train, quality, seed=seed, rounds=rounds, share=share, scope=scope)
    return found
