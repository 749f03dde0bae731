"""A draft for SmolLM2: one block that reads what the target thought last, trained on what the target itself writes.

EAGLE (arXiv:2401.15077), section 4. Paper -> here: f_t, the feature of the target's last layer at token t = its normed
hidden row; e_t+1, the embedding of the token after it = the target's own, frozen; the FC layer = `join`; the one
decoder layer = `block`; the frozen LM head = the target's rows of `words`. From f_t and e_t+1 it foretells f_t+1, and
so the law of token t+2; its own f is the next one's input, until the target tells the true ones.

Deviations: guesses come from the most frequent words alone (q = 0 elsewhere, which stays lossless), since the head of
49152 words would cost most of a draft; the loss is the divergence from the target's law, and a part for the feature;
half of the features that it is trained on are its own guesses (as in HASS, arXiv:2408.15766), instead of noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine import hardware
from engine.caches import Cache
from engine.caches.full import Full
from engine.mixers.rope import rope_tables
from engine.mixers.softmax import SoftmaxAttention
from engine.model import Block, Decoder, SwiGLU
from engine.norm import RMSNorm
from engine.packed import Packed, can_pack
from engine.speculate import ROOT, Dice, Draft, Drafter, Verdict
from engine.speculate.chain import guessing
from engine.speculate.seeds import seeds
from engine.speculate.tree import Branches, siblings

NEW = 192  # tokens that the target writes after each seed prompt
ROWS = 64  # texts written at a time
WARM = 0.8  # temperature of every second text; the others take the likeliest token
WORDS = 4096  # words that the draft can say
FFN = 1024  # width of its feed-forward part
PROMPT = 32  # tokens of a seed prompt at most: the end marks among them end no text
FEATURE = 0.2  # weight of the features in the loss


class Feature(nn.Module):
    """The block, and the frozen rows that it borrows from its target. `words` [R] are the ids that it can say."""

    def __init__(self, target: Decoder, words: Tensor, *, ffn_width: int = FFN) -> None:
        super().__init__()
        shape = target.shape
        self.shape = replace(shape, layers=1, ffn_width=ffn_width)
        self.join = nn.Linear(2 * shape.width, shape.width, bias=False)
        self.block = Block(self.shape, mixer=SoftmaxAttention(self.shape, 0), ffn=SwiGLU(self.shape))
        self.norm = RMSNorm(shape.width, eps=shape.norm_eps)
        self.register_buffer("words", words.long())
        self.borrow(target)

    def borrow(self, target: Decoder) -> None:
        """Take embedding and head of the target: shared, never stored, never trained."""
        weight = target.embed.weight
        self._embed = weight.detach()
        self._head = self._embed[self.words] if target.shape.tied else target.head.weight.detach()[self.words]  # R W
        self._rope = rope_tables(
            self.shape.head_width, base=self.shape.rope_base, count=self.shape.max_positions, dtype=weight.dtype,
            device=weight.device,
        )  # fmt: skip
        self._packed_head: nn.Module | None = None

    def forward(self, features: Tensor, ids: Tensor, *, cache: Cache | None = None) -> Tensor:
        """features [B, T, W] of tokens and the ids [B, T] of the tokens after them -> the features of these."""
        x = self.join(torch.cat((features, F.embedding(ids, self._embed)), -1))
        x = self.block(x, rope=self._rope, cache=cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """features [..., W] -> logits of `words` [..., R]."""
        return F.linear(features, self._head) if self._packed_head is None else self._packed_head(features)

    def start_from(self, target: Decoder) -> None:
        """Begin where little is left to learn: the last block of the target, as wide as there is room."""
        last = target.blocks[-1]
        width, wide = self.shape.ffn_width, target.shape.ffn_width
        with torch.no_grad():
            # The neurons that write most: the norms of their columns.
            neurons = last.ffn.down.weight.norm(dim=0).topk(width).indices.sort().values
            self.block.mixer.load_state_dict(last.mixer.state_dict())
            self.block.norm1.load_state_dict(last.norm1.state_dict())
            self.block.norm2.load_state_dict(last.norm2.state_dict())
            self.norm.load_state_dict(target.norm.state_dict())
            rows = torch.cat((neurons, neurons + wide))
            self.block.ffn.gate_up.weight.copy_(last.ffn.gate_up.weight[rows])
            self.block.ffn.down.weight.copy_(last.ffn.down.weight[:, neurons])
            eye = torch.eye(self.shape.width)
            self.join.weight.copy_(torch.cat((0.1 * eye, eye), 1))


def packed(model: Feature) -> Feature:
    """The same with its weights in the layout that the processor reads fastest, where there is one; in place."""
    if can_pack(model._embed):
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Packed(child.weight))
        model._packed_head = Packed(model._head)
    return model


class FeatureDraft(Drafter):
    """Guesses by a `Feature`: a chain of `length` tokens, or a tree of `widths` words a depth; ways as in `Tree`."""

    def __init__(
        self, model: Feature, *, length: int = 3, widths: Sequence[int] | None = None, ways: str = "distinct"
    ) -> None:
        if length < 1 or (widths is not None and (not widths or min(widths) < 1)):
            raise ValueError(f"length and widths must be numbers above 0, not {length} and {widths}")
        self.model, self.length, self.widths, self.ways = model, length, widths, ways
        self.cache = Full()
        self._heard: list[Tensor] = []  # features [n, W] of tokens that the block has not read yet

    def told(self, draft: Draft, verdict: Verdict, hidden: Tensor) -> None:
        self._heard.append(hidden)

    def draft(self, text: Sequence[int], *, room: int, temperature: float, dice: Dice) -> Draft:
        features = torch.cat(self._heard)[None]  # 1 n W
        known = self.cache.seen + features.shape[1]  # the features there are: of all tokens but the last
        if known != len(text) - 1:
            raise ValueError(f"the drafter was told of {known} tokens, and the text has {len(text)}")
        widths = self.widths or (1,) * self.length
        parents: list[int] = []
        tokens: list[int] = []
        laws: list[Tensor | None] = []
        level = [ROOT]
        row_of: dict[int, int] = {}
        with guessing(self.cache, known):
            hidden = self.model(features, self._ids(text[self.cache.seen + 1 :]), cache=self.cache)[0, -1:]
            self._heard.clear()
            branches: Branches | Full = self.cache
            for depth, width in enumerate(widths[:room]):
                if depth:
                    if max(widths) > 1:
                        branches = branches if isinstance(branches, Branches) else Branches(self.cache)
                        branches.grow([parents[node] for node in level])
                    above = hidden[[row_of[parents[node]] for node in level]]
                    hidden = self.model(above[None], self._ids([tokens[node] for node in level]), cache=branches)[0]
                row_of = {node: row for row, node in enumerate(level)}
                below = []
                for node, row in zip(level, self.model.logits(hidden), strict=True):
                    for token, q in self._siblings(row, width, temperature, dice):
                        below.append(len(tokens))
                        parents.append(node)
                        tokens.append(token)
                        laws.append(q)
                level = below
        return Draft(tuple(parents), tuple(tokens), tuple(laws))

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.model.words.device)

    def _siblings(self, logits: Tensor, width: int, temperature: float, dice: Dice) -> list[tuple[int, Tensor | None]]:
        """`siblings` over the few words, told in ids and laws of the whole vocabulary."""
        found = siblings(logits, width, ways=self.ways, temperature=temperature, dice=dice)
        return [(int(self.model.words[word]), None if q is None else self._whole(q)) for word, q in found]

    def _whole(self, q: Tensor) -> Tensor:
        return torch.zeros(self.model.shape.vocab, dtype=q.dtype).index_copy_(0, self.model.words.cpu(), q)


@torch.inference_mode()
def make_data(
    model: Decoder,
    encode: Callable[[str], list[int]],
    folder: Path,
    *,
    seconds: float = 1200.0,
    batches: int = 10**6,
    rows: int = ROWS,
    new: int = NEW,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> int:
    """Let `model` write texts after our seed prompts into `folder`, until `seconds` are up; returns the files there.

    A file holds `ids` [rows, T] and `hidden` [rows, T - 1, W], what the model thought when it had read each of them:
    its logits follow from that. Files that are there already are kept, so that a stopped run goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = _batches([encode(prompt) for prompt in seeds(3000, seed=seed)], rows=rows, seed=seed)[:batches]
    began = time.monotonic()
    done = 0
    for number, prompts in enumerate(plan):
        path = folder / f"{number:04}.safetensors"
        if not path.exists():
            if time.monotonic() - began > seconds:
                break
            ids, hidden = write(model, torch.tensor(prompts), new=new, seed=seed + number)
            part = path.with_suffix(".part")
            save_file({"ids": ids.int(), "hidden": hidden.bfloat16()}, part)
            part.replace(path)
        done += 1
        if progress is not None:
            progress(done, time.monotonic() - began)
    return done


def write(model: Decoder, prompts: Tensor, *, new: int, seed: int) -> tuple[Tensor, Tensor]:
    """Go on from prompts [B, N] of one length: ids [B, N + new] and the hidden rows [B, N + new - 1, W].

    Every second text is drawn at temperature WARM, the others are greedy.
    """
    generator = torch.Generator().manual_seed(seed)
    cache = Full(capacity=prompts.shape[1] + new)
    ids, parts = prompts, []
    for _ in range(new):
        unread = ids if not parts else ids[:, -1:]
        parts.append(model.hidden(unread, cache=cache))
        logits = model.logits(parts[-1][:, -1])  # B V
        noisy = logits[1::2].float() / WARM
        # Gumbel's trick: the largest of logit minus log of an exponential number is a draw from the softmax.
        noisy -= torch.empty_like(noisy).exponential_(generator=generator).log_()
        token = logits.max(-1).indices
        token[1::2] = noisy.max(-1).indices
        ids = torch.cat((ids, token[:, None]), 1)
    return ids, torch.cat(parts, 1)


def _batches(prompts: list[list[int]], *, rows: int, seed: int) -> list[list[list[int]]]:
    """Full batches of prompts of equal length, in mixed order."""
    by_length: dict[int, list[list[int]]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt), []).append(prompt)
    groups = [same[i : i + rows] for same in by_length.values() for i in range(0, len(same) - rows + 1, rows)]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    return [groups[i] for i in order]


# --- training --------------------------------------------------------------------------------------------------


def frequent(ids: Tensor, *, vocab: int, count: int = WORDS) -> Tensor:
    """The `count` most frequent ids, in order of id; ties go to the lower id, which byte-pair merging found earlier."""
    if not 1 <= count <= vocab:
        raise ValueError(f"count must be a number of words from 1 to {vocab}, not {count}")
    found = torch.bincount(ids.flatten(), minlength=vocab)
    return found.argsort(descending=True, stable=True)[:count].sort().values


def loss_of(
    model: Feature, ids: Tensor, hidden: Tensor, *, generator: torch.Generator, eos: int | None
) -> tuple[Tensor, dict[str, float]]:
    """ids [B, T + 1] and the target's rows hidden [B, T, W]: how far the draft is from the target, and figures.

    Half of the features that it reads are its own, from a first pass that is not trained: when it drafts, most are.
    """
    features, following, truth = hidden[:, :-1], ids[:, 1:-1], hidden[:, 1:]  # of t, the token t + 1, of t + 1
    with torch.no_grad():
        own = model(features, following)  # foretells the feature of t + 1
        coin = torch.rand(features.shape[:2], generator=generator).lt(0.5)
        coin[:, 0] = False
        shifted = torch.cat((features[:, :1], own[:, :-1]), 1)
        wanted = F.linear(truth, model._head).float().log_softmax(-1)  # B T-1 R
    mixed = torch.where(coin[..., None], shifted, features)
    out = model(mixed, following)
    said = model.logits(out).float().log_softmax(-1)
    # After the end of a text the target goes on with anything: not worth learning.
    alive = torch.ones_like(following, dtype=torch.bool)
    if eos is not None:
        ends = following == eos
        ends[:, :PROMPT] = False
        ended = ends.cumsum(1).bool()
        alive = ~ended
    divergence = (wanted.exp() * (wanted - said)).sum(-1)[alive].mean()
    apart = F.smooth_l1_loss(out.float(), truth.float(), reduction="none").mean(-1)[alive].mean()
    same = (said.argmax(-1) == wanted.argmax(-1))[alive].float().mean()
    overlap = torch.minimum(said.exp(), wanted.exp()).sum(-1)[alive].mean()
    figures = {"divergence": divergence, "feature": apart, "same": same, "overlap": overlap}
    return divergence + FEATURE * apart, {name: float(value.detach()) for name, value in figures.items()}


def train(
    model: Feature,
    folder: Path,
    *,
    steps: int,
    rows: int = 16,
    rate: float = 6e-4,
    warmup: int = 30,
    until: int | None = None,
    eos: int | None = None,
    checkpoint: Path | None = None,
    every: float = 60.0,
    seed: int = 0,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> int:
    """Train on the files of `make_data` (all but the last, which is for testing); returns the steps done in all.

    AdamW with warm-up and cosine, the products in bfloat16. A checkpoint resumes it; `until` stops it early, to go on
    another time.
    """
    files = sorted(folder.glob("*.safetensors"))[:-1]
    if not files:
        raise ValueError(f"{folder} must hold two files of texts at least: call make_data first")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    start, stop = _resume(checkpoint, model, optimiser), min(steps, steps if until is None else until)
    saved = time.monotonic()
    generator = torch.Generator()
    for at in range(start, stop):
        generator.manual_seed(seed + at)
        ids, hidden = _batch(files, rows, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=hardware.fast_dtype(torch.device("cpu")) == torch.bfloat16):
            loss, figures = loss_of(model, ids, hidden.to(model._embed.dtype), generator=generator, eos=eos)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (at + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * at / steps))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        now = time.monotonic()
        if checkpoint is not None and (at + 1 == stop or now - saved > every):
            _save(checkpoint, model, optimiser, at + 1)
            saved = now
        if progress is not None:
            progress(at + 1, steps, figures)
    return max(start, stop)


def _batch(files: Sequence[Path], rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some texts of one file, read by slices so that the files need not fit into memory."""
    path = files[int(torch.randint(len(files), (), generator=generator))]
    with safe_open(str(path), "pt") as file:
        ids, hidden = file.get_slice("ids"), file.get_slice("hidden")
        first = int(torch.randint(max(1, ids.get_shape()[0] - rows + 1), (), generator=generator))
        return ids[first : first + rows].long(), hidden[first : first + rows]


def _save(path: Path, model: Feature, optimiser: torch.optim.Optimizer, at: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": value for name, value in state.items()}
    part = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part, metadata={"step": str(at)})
    part.replace(path)


def _resume(path: Path | None, model: Feature, optimiser: torch.optim.Optimizer) -> int:
    if path is None or not path.exists():
        return 0
    with safe_open(str(path), "pt") as file:
        at = int((file.metadata() or {})["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return at
