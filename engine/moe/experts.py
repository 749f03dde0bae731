r"""A mixture of experts in place of the feed-forward network: a router calls k of E networks for each token.

Switch (arXiv:2101.03961), figure 2; Mixtral (arXiv:2401.04088), section 2.1; the shared experts of DeepSeekMoE
(arXiv:2401.06066), section 3.2, which work on every token and pass no router.

    y = Σ_e gate_e(x) · expert_e(x)  +  Σ_s shared_s(x)

Paper -> here: W_g or W_r = `router`; E_i = experts[i]; G(x), g_i = gates; K_s = how many are shared; alpha = balance.
Shapes: x [..., W] -> y [..., W]; taps flatten all but the last axis to tokens.
Deviations: DeepSeekMoE splits experts finer (give a smaller `width`); nothing limits how many devices a token meets.

    Decoder(shape, ffn=lambda layer: Experts(shape, layer, count=8, route=TopK(2), balance=0.01))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.auxiliary import add_loss, losses_wanted
from engine.moe.router import Router, Routing, TopK, balance_loss, z_loss
from engine.recording import recording_on, site, tap

if TYPE_CHECKING:
    from engine.model import Shape

PROBABILITY = site("moe.probability", "how likely the router finds each expert for a token", symbol="p_i(x)",
                   grows="token", low=0.0, high=1.0)  # fmt: skip
GATE = site("moe.gate", "the weight of each expert in a token's answer, 0 where it is not called", symbol="g_i(x)",
            grows="token", low=0.0, high=1.0)  # fmt: skip
CHOSEN = site("moe.chosen", "which experts a token asks for", grows="token", low=0.0, high=1.0)
DROPPED = site("moe.dropped", "which experts a token asked for and found full", grows="token", low=0.0, high=1.0)
LOAD = site("moe.load", "tokens of this pass that asked for each expert", low=0.0)
BALANCE = site("moe.balance", "the balance loss, 1 when experts are called evenly", symbol="E Σ f_i P_i", low=0.0)
Z = site("moe.z", "the router's z-loss, before its weight", symbol="L_z", low=0.0)


class Experts(nn.Module):
    """The feed-forward part of a block, with `count` experts of the activation that `shape` names.

    `width` is that of one expert (shape.ffn_width by default), `shared` how many more work on every token. In training
    the balance loss times `balance` and the z-loss times `z` are added to the loss (`engine.auxiliary`).
    """

    def __init__(
        self,
        shape: Shape,
        layer: int,
        *,
        count: int,
        route: Router | None = None,
        shared: int = 0,
        width: int | None = None,
        balance: float = 0.01,
        z: float = 0.0,
    ) -> None:
        super().__init__()
        from engine.model import FFNS  # the model imports whatever mixes tokens, and recipes import both

        for name, value, low in (("count", count, 1), ("shared", shared, 0), ("balance", balance, 0), ("z", z, 0)):
            if not low <= value < float("inf"):
                raise ValueError(f"{name} must be {low} or more, not {value}")
        self.layer, self.balance, self.z = layer, balance, z
        self.route: Router = TopK(2) if route is None else route
        self.route.check(count)
        one = shape if width is None else replace(shape, ffn_width=width)
        self.router = nn.Linear(shape.width, count, bias=False)
        self.experts = nn.ModuleList(FFNS[shape.activation](one) for _ in range(count))
        self.shared = nn.ModuleList(FFNS[shape.activation](one) for _ in range(shared))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # N W
        logits = self.router(tokens)  # N E
        routing = self.route(logits)
        self._add_losses(routing, logits)
        show(routing, self.layer)
        y = dispatch(tokens, routing, self.experts)  # N W
        for expert in self.shared:
            y = y + expert(tokens)
        return y.view_as(x)

    def multiplications(self, *, rows: int) -> int:
        """Of the router, of as many experts as a token calls (drops not counted), and of the shared ones."""
        called = self.route.per_token * product(self.experts[0]) + sum(product(expert) for expert in self.shared)
        return round(rows * (self.router.in_features * self.router.out_features + called))

    def _add_losses(self, routing: Routing, logits: Tensor) -> None:
        layer = self.layer
        if (self.balance and losses_wanted()) or recording_on(BALANCE, layer=layer):
            balance = tap(BALANCE, balance_loss(routing), "", layer=layer)
            if self.balance:
                add_loss(self.balance * balance)
        if self.z and (losses_wanted() or recording_on(Z, layer=layer)):
            add_loss(self.z * tap(Z, z_loss(logits), "", layer=layer))


def product(expert: nn.Module) -> int:
    """Multiplications of an expert for one token."""
    return sum(m.in_features * m.out_features for m in expert.modules() if isinstance(m, nn.Linear))


def show(routing: Routing, layer: int) -> None:
    """Tap what a layer's router decided."""
    tap(PROBABILITY, routing.probabilities, "token expert", layer=layer)
    tap(GATE, routing.gates, "token expert", layer=layer)
    tap(CHOSEN, routing.chosen, "token expert", layer=layer)
    if recording_on(DROPPED, layer=layer):
        tap(DROPPED, routing.dropped, "token expert", layer=layer)
    if recording_on(LOAD, layer=layer):
        tap(LOAD, routing.load, "expert", layer=layer)


def mixture(x: Tensor, gates: Tensor, experts: Sequence[nn.Module] | nn.ModuleList) -> Tensor:
    """The clear form: every expert works on every token of x [N, W], and gates [N, E] weigh the answers."""
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        y = y + gates[:, e, None] * expert(x)
    return y


def dispatch(x: Tensor, routing: Routing, experts: Sequence[nn.Module] | nn.ModuleList) -> Tensor:
    """The same, each expert called once for the tokens sent to it: [N, W]. A token sent nowhere gets zeros."""
    return gathered(x, routing, lambda needed: ((e, experts[e]) for e in needed))


def gathered(x: Tensor, routing: Routing, serve: Callable[[list[int]], Iterable[tuple[int, nn.Module]]]) -> Tensor:
    """`dispatch` with experts that come when they come: serve(needed) gives each with its number, in any order.

    The answers are added in the order of the experts, so that who came first changes no bit of the sum.
    """
    expert, token = routing.sent.T.nonzero(as_tuple=True)  # pairs, by expert and then by token
    gates = routing.gates[token, expert]  # pairs
    groups = x[token].split(routing.sent.sum(0).tolist())
    needed = [e for e, group in enumerate(groups) if len(group)]
    answers = {e: module(groups[e]) for e, module in serve(needed)}
    y = torch.zeros_like(x)
    if not needed:
        return y
    return y.index_add(0, token, torch.cat([answers[e] for e in needed]) * gates[:, None])
