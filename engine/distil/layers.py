r"""Layer matching: the student's layers learn to hold what the teacher's hold.

FitNets (arXiv:1412.6550), equation 3: ½‖u_h - r(v_g)‖², a learned map r where widths differ; TinyBERT
(arXiv:1909.10351), its attention-based and hidden-states-based terms: mean squared differences of attention scores
before the softmax and of hidden states.
Paper -> here: H^S, H^T = `hidden`; A^S, A^T = `scores`; W_h = `Projections`; n = g(m) = `layer_map`, 0 -> 0 the
embeddings.
Shapes: hidden [B, T, W] after the embedding and each block (L + 1 of them); scores [B, H, T, T] of each block, -inf
above the diagonal; the loss is the mean over what both have.
Errors: ValueError for maps that do not fit, for heads that differ in number, for mixers that have no scores.
Deviations: no projection where widths are equal; causal: only the scores a query may see are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.caches import fresh
from engine.mixers.softmax import SoftmaxAttention, attention_scores
from engine.model import Decoder
from engine.recording import site, tap

ALIGNMENT = site("distil.alignment", "how alike a student's and a teacher's layer see the same tokens (linear CKA)",
                 symbol="CKA", low=0.0, high=1.0)  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """One pass with its insides, all of them differentiable."""

    logits: Tensor  # B T V
    hidden: list[Tensor]  # L + 1 times B T W: the embedding, then each block's output
    scores: list[Tensor]  # L times B H T T, before the softmax


def trace(model: Decoder, ids: Tensor) -> Trace:
    """Read ids [B, T] and keep what the layers hold. The model's own code runs: hooks look at it."""
    hidden: list[Tensor] = []
    qkv: list[tuple[SoftmaxAttention, Tensor]] = []
    handles = []
    for layer, block in enumerate(model.blocks):
        mixer = block.mixer
        if not isinstance(mixer, SoftmaxAttention):
            raise ValueError(f"model must have softmax attention in every layer, and layer {layer} has none")

        def enters(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not hidden:
                hidden.append(args[0])

        def leaves(module: nn.Module, args: Any, out: Tensor) -> None:
            hidden.append(out)

        def asks(module: nn.Module, args: Any, out: Tensor, mixer: SoftmaxAttention = mixer) -> None:
            qkv.append((mixer, out))

        handles += [
            block.register_forward_pre_hook(enters),
            block.register_forward_hook(leaves),
            mixer.qkv.register_forward_hook(asks),
        ]
    try:
        logits = model(ids)
    finally:
        for handle in handles:
            handle.remove()
    rope = model.rope(hidden[0])
    scores = []
    for mixer, out in qkv:
        B, T, _ = out.shape
        H, G = mixer.heads, mixer.kv_heads
        heads = out.view(B, T, H + 2 * G, mixer.head_width).transpose(1, 2)
        view = fresh(heads[:, H : H + G], heads[:, H + G :], rope)
        scores.append(attention_scores(rope.rotate(heads[:, :H], view.q_positions), view, T))
    return Trace(logits, hidden, scores)


def layer_map(student: int, teacher: int) -> list[int]:
    """g: the teacher's layer for the embedding (0) and for each of the student's layers, spread evenly to the last."""
    if not 1 <= student <= teacher:
        raise ValueError(f"student must have from 1 to {teacher} layers, as many as its teacher at most, not {student}")
    return [-(-m * teacher // student) for m in range(student + 1)]


class Projections(nn.Module):
    """W_h of each matched pair; nothing where the widths are equal."""

    def __init__(self, count: int, student: int, teacher: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        maps: list[nn.Module] = []
        for _ in range(count):
            if student == teacher:
                maps.append(nn.Identity())
                continue
            linear = nn.Linear(student, teacher, bias=False, device="meta")
            linear.weight = nn.Parameter(torch.randn(teacher, student, generator=generator) / student**0.5)
            maps.append(linear)
        self.maps = nn.ModuleList(maps)

    def forward(self, hidden: Tensor, at: int) -> Tensor:
        y: Tensor = self.maps[at](hidden)
        return y


def hidden_loss(student: Trace, teacher: Trace, g: Sequence[int], projections: Projections) -> Tensor:
    """The mean squared difference of hidden states, the mean over matched pairs."""
    _check_map(student, teacher, g)
    pairs = [
        F.mse_loss(projections(student.hidden[m], m), teacher.hidden[n].detach()) for m, n in enumerate(g)
    ]  # fmt: skip
    return torch.stack(pairs).mean()


def attention_loss(student: Trace, teacher: Trace, g: Sequence[int]) -> Tensor:
    """The mean squared difference of attention scores that a causal reader has, the mean over matched layers."""
    _check_map(student, teacher, g)
    pairs = []
    for m, n in enumerate(g):
        if m == 0:
            continue  # the embedding attends to nothing
        own, other = student.scores[m - 1], teacher.scores[n - 1].detach()
        if own.shape != other.shape:
            raise ValueError(f"student must have as many heads as its teacher, {other.shape[1]}, not {own.shape[1]}")
        seen = other.isfinite()
        pairs.append((own[seen] - other[seen]).square().mean())
    return torch.stack(pairs).mean()


@torch.no_grad()
def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA (arXiv:1905.00414) of two views of the same N tokens, [N, a] and [N, b]: 1 when one is the other
    turned and scaled, near 0 when they have nothing in common."""
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"x and y must be [N, width] with two tokens at least, not {list(x.shape)} and {list(y.shape)}"
        )
    return float((_alike(x) * _alike(y)).sum())


def _alike(x: Tensor) -> Tensor:
    """How alike each two of N tokens are in x [N, width]: the Gram matrix of what is centred, of length 1; 0 where all
    are the same."""
    x = x.double() - x.double().mean(0)
    gram = x @ x.mT  # N N
    length = float(gram.norm())
    return gram / length if length else gram


@torch.no_grad()
def alignment(student: Trace, teacher: Trace, **index: int | str) -> Tensor:
    """CKA of every hidden state of the student with every one of the teacher: [m, n], tapped."""
    own, other = (torch.stack([_alike(h.flatten(0, 1)) for h in t.hidden]) for t in (student, teacher))  # layer N N
    return tap(ALIGNMENT, (own.flatten(1) @ other.flatten(1).mT).float(), "student teacher", **index)


def _check_map(student: Trace, teacher: Trace, g: Sequence[int]) -> None:
    if len(g) != len(student.hidden) or not all(0 <= n < len(teacher.hidden) for n in g) or g[0] != 0:
        raise ValueError(
            f"g must give 0 and one of the teacher's layers 1..{len(teacher.hidden) - 1} for each of the student's "
            f"{len(student.hidden) - 1}, not {list(g)}"
        )
