"""Four students of one teacher at equal steps: right words, soft labels, layers, and the teacher's own texts; by seeds.

    hard        CE on real texts                                    the baseline that the others must beat
    soft        α T² KL + (1-α) CE on the same texts                logits.py
    layers      soft, and hidden states and attention scores too    layers.py
    synthetic   CE on texts that the teacher wrote                  synthetic.py, no real text is read

All students of a seed start from the same weights and, but for the synthetic one, read the same texts. A step of the
recording is one step of every student. A recorder's on_step may raise to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import cost
from engine.distil import layers, logits, synthetic
from engine.mimetic import mimetic
from engine.model import Decoder, Shape
from engine.recording import recording_on, site, step, tap
from engine.toyland import Batch, Grammar, batch

LOSS = site("distil.loss", "the loss that the student is trained on", low=0.0, unit="nats")
TERM = site("distil.term", "one term of the loss, unweighed", low=0.0)
UNSEEN = site("distil.unseen", "mean surprisal of unseen real texts", symbol="CE", low=0.0, unit="nats")
MAP = site("distil.map", "surprisal of unseen texts at the end, for each alpha and temperature", unit="nats")

WAYS = ("hard", "soft", "layers", "synthetic")


@dataclass(frozen=True)
class Plan:
    """How the students are trained. `look` steps lie between two measurements; `corpus` texts are written."""

    steps: int = 120
    rows: int = 8
    length: int = 32
    rate: float = 4e-3
    temperature: float = 2.0
    alpha: float = 0.9
    inside: float = 0.1  # the weight of the layer terms
    seeds: tuple[int, ...] = (0, 1, 2)
    look: int = 20
    corpus: int = 256
    unseen_rows: int = 16

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "look", "corpus", "unseen_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a number above 0, not {getattr(self, name)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must hold different numbers, one at least, not {self.seeds}")


def small(teacher: Shape, *, layers: int = 2, narrower: int = 2) -> Shape:
    """A student's shape: fewer layers, heads as many but narrower, the same vocabulary."""
    if narrower < 1 or teacher.width % narrower or teacher.head_width % (2 * narrower):
        raise ValueError(f"narrower must divide width and half the head width of the teacher, and {narrower} does not")
    return replace(
        teacher, layers=layers, width=teacher.width // narrower, head_width=teacher.head_width // narrower,
        ffn_width=teacher.ffn_width // narrower,
    )  # fmt: skip


def saving(teacher: Shape, student: Shape, *, context: int) -> dict[str, float]:
    """How many times cheaper the student is: parameters, FLOPs and bytes of a decoded token that sees `context`."""
    pairs = {
        "parameters": (cost.parameter_count(teacher), cost.parameter_count(student)),
        "flops": (cost.decode_flops(teacher, context=context), cost.decode_flops(student, context=context)),
        "bytes": (cost.decode_bytes(teacher, context=context), cost.decode_bytes(student, context=context)),
    }
    return {name: big / little for name, (big, little) in pairs.items()}


Texts = Callable[[int, int], Batch]
"""The real texts of (seed, step)."""
Teach = Callable[[Tensor], layers.Trace]
"""What the teacher makes of ids [B, T]."""
Write = Callable[[int], Tensor]
"""The texts that the teacher writes for a seed: ids [corpus, T]."""
Students = dict[tuple[str, int], "Student"]


def toyland(plan: Plan, grammar: Grammar | None = None, *, texts: int = 0) -> Texts:
    """Stories without end; or `texts` of them (rounded up to whole batches) again and again."""
    told, batches = grammar or Grammar(), -(-texts // plan.rows)

    def tell(seed: int, at: int) -> Batch:
        place = at % batches if batches else at
        return batch(told, seed=seed, step=place, rows=plan.rows, length=plan.length, stream="distil")

    return tell


class Student:
    """One student in training: its model, optimiser and way of learning."""

    def __init__(self, way: str, teacher: Decoder, shape: Shape, plan: Plan, *, seed: int) -> None:
        if way not in WAYS:
            raise ValueError(f"way must be one of {', '.join(WAYS)}, not {way!r}")
        self.way, self.plan, self.seed = way, plan, seed
        device, dtype = teacher.embed.weight.device, teacher.embed.weight.dtype
        self.model = mimetic(Decoder(shape, seed=seed), seed=seed).to(device, dtype).train()
        self.g = layers.layer_map(shape.layers, teacher.shape.layers)
        self.maps = layers.Projections(len(self.g), shape.width, teacher.shape.width, seed=seed).to(device, dtype)
        learned = [*self.model.parameters(), *(self.maps.parameters() if way == "layers" else ())]
        self.learned = learned
        self.optimiser = torch.optim.AdamW(learned, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0)

    def terms(self, ids: Tensor, taught: layers.Trace | None) -> dict[str, tuple[float, Tensor]]:
        """The loss of ids [B, T] as terms with their weights. `taught` is what the teacher made of ids[:, :-1]."""
        read, targets = ids[:, :-1], ids[:, 1:]
        plan = self.plan
        if self.way in ("hard", "synthetic") or taught is None:
            return {"hard": (1.0, F.cross_entropy(self.model(read).flatten(0, 1), targets.flatten()))}
        own = layers.trace(self.model, read) if self.way == "layers" else None
        said = self.model(read) if own is None else own.logits
        both = logits.loss(said, taught.logits, targets, temperature=plan.temperature, alpha=plan.alpha)
        found = {"soft": (plan.alpha, both.soft), "hard": (1 - plan.alpha, both.hard)}
        if own is not None:
            found["hidden"] = (plan.inside, layers.hidden_loss(own, taught, self.g, self.maps))
            found["attention"] = (plan.inside, layers.attention_loss(own, taught, self.g))
        return found

    def learn(self, ids: Tensor, taught: layers.Trace | None, *, rate: float, told: bool = True) -> None:
        """One step; its loss and terms are tapped if `told`."""
        terms = self.terms(ids, taught)
        loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimiser.step()
        if not told:
            return
        tap(LOSS, loss, "", way=self.way, seed=self.seed)
        for name, (_, term) in terms.items():
            tap(TERM, term, "", term=name, way=self.way, seed=self.seed)


@torch.no_grad()
def surprisal(model: Decoder, ids: Tensor) -> float:
    """Nats a token of texts [B, T]."""
    return float(F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten()))


def distil(
    teacher: Decoder,
    shape: Shape,
    plan: Plan,
    *,
    ways: Sequence[str] = WAYS,
    texts: Texts | None = None,
    unseen: Batch | None = None,
    teach: Teach | None = None,
    write: Write | None = None,
    look: Callable[[Students, int], None] | None = None,
    told: bool = True,
    stride: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Students:
    """Train a student for each way and seed, side by side; their surprisal on `unseen` is tapped every few steps, and
    `look` is called with the students and the steps done. Not `told`, only `look` tells. A step of the recording is
    `stride` steps of training.

    `teach` and `write` stand for a teacher that speaks within fewer words than it knows; its students' vocabulary is
    then that of the traces.
    """
    if teach is None and shape.vocab != teacher.shape.vocab:
        raise ValueError(f"shape must have the teacher's vocabulary of {teacher.shape.vocab}, not {shape.vocab}")
    if stride < 1:
        raise ValueError(f"stride must be a number of steps above 0, not {stride}")
    texts = texts or toyland(plan)
    device = teacher.embed.weight.device
    test = unseen or batch(Grammar(), seed=0, step=0, rows=plan.unseen_rows, length=plan.length, stream="test")
    ids = test.ids.to(device)
    if teach is None:
        teach = partial(layers.trace if told or "layers" in ways else _answers, teacher)
    write = write or (lambda seed: _written(teacher, ids[0, :1], plan, seed))
    students = {(way, seed): Student(way, teacher, shape, plan, seed=seed) for seed in plan.seeds for way in ways}
    written = {seed: write(seed).to(device) for seed in plan.seeds if "synthetic" in ways}
    with torch.inference_mode(False), torch.enable_grad():
        for at in range(plan.steps):
            if at % plan.look == 0:
                _show(students, teach if told else None, ids, at, look)
            for seed in plan.seeds:
                real = texts(seed, at).ids.to(device) if set(ways) != {"synthetic"} else None
                taught = None
                if real is not None and {"soft", "layers"} & set(ways):
                    with torch.no_grad():
                        taught = teach(real[:, :-1])
                for way in ways:
                    own = _rows(written[seed], plan, at) if way == "synthetic" or real is None else real
                    students[way, seed].learn(own, taught, rate=plan.rate * (1 - at / plan.steps), told=told)
            if at + 1 == plan.steps:
                _show(students, teach if told else None, ids, plan.steps, look)
            if (at + 1) % stride == 0 or at + 1 == plan.steps:
                step()
            if progress is not None:
                progress(at + 1, plan.steps)
    for student in students.values():
        student.model.eval().requires_grad_(False)
    return students


def _answers(teacher: Decoder, ids: Tensor) -> layers.Trace:
    """What soft labels need of the teacher: no insides."""
    return layers.Trace(teacher(ids), [], [])


def _written(teacher: Decoder, start: Tensor, plan: Plan, seed: int) -> Tensor:
    return synthetic.write(teacher, start, rows=plan.corpus, length=plan.length, seed=seed).ids


def _rows(corpus: Tensor, plan: Plan, at: int) -> Tensor:
    """The rows of a corpus that are read at a step, over and over."""
    return corpus[((torch.arange(plan.rows) + at * plan.rows) % len(corpus)).to(corpus.device)]


def over(
    teacher: Decoder,
    shape: Shape,
    plan: Plan,
    *,
    alphas: Sequence[float],
    temperatures: Sequence[float],
    texts: Texts | None = None,
    unseen: Batch | None = None,
    teach: Teach | None = None,
) -> Tensor:
    """The surprisal of unseen texts after training with soft labels, for each α and T: [alpha, temperature], the mean
    over the plan's seeds; tapped cell by cell, NaN where none has been trained yet. A step of the recording is
    `plan.look` steps. Where α is 0 no temperature matters: one training is the whole row."""
    if not alphas or not temperatures:
        raise ValueError("alphas and temperatures must hold a value each at least")
    test = unseen or batch(Grammar(), seed=0, step=0, rows=plan.unseen_rows, length=plan.length, stream="test")
    ids = test.ids.to(teacher.embed.weight.device)
    rows = torch.full((len(alphas), len(temperatures)), torch.nan)
    for i, alpha in enumerate(alphas):
        for j, temperature in enumerate(temperatures):
            if alpha == 0 and j > 0:
                continue
            cells = slice(None) if alpha == 0 else slice(j, j + 1)

            def look(students: Students, at: int, i: int = i, cells: slice = cells) -> None:
                if at == plan.steps:
                    nats = [surprisal(s.model, ids) for s in students.values()]
                    rows[i, cells] = sum(nats) / len(nats)
                    tap(MAP, rows, "alpha temperature")

            distil(
                teacher, shape, replace(plan, alpha=alpha, temperature=temperature), ways=("soft",), texts=texts,
                unseen=test, teach=teach, look=look, told=False, stride=plan.look,
            )  # fmt: skip
    return rows


def _show(
    students: Students, teach: Teach | None, ids: Tensor, at: int, look: Callable[[Students, int], None] | None
) -> None:
    for (way, seed), student in students.items():
        if teach is not None and recording_on(UNSEEN, way=way, seed=seed):
            tap(UNSEEN, surprisal(student.model, ids), "", way=way, seed=seed)
    first = min(seed for _, seed in students)  # one seed's alignment is enough to look at
    if teach is not None and recording_on(layers.ALIGNMENT):
        with torch.no_grad():
            taught = teach(ids[:4, :-1])
            for (way, seed), student in students.items():
                if seed == first:
                    layers.alignment(layers.trace(student.model, ids[:4, :-1]), taught, way=way)
    if look is not None:
        look(students, at)
