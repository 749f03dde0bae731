"""What the lesson on distillation runs: a teacher and its texts, four students in a race, a map, a specialist."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from engine import cost
from engine.distil import layers, logits
from engine.distil.run import UNSEEN, WAYS, Plan, distil, over, saving, small, surprisal, toyland
from engine.distil.school import School, of_texts, recall
from engine.generate import generate
from engine.model import Decoder
from engine.recording import Recording, aside, event, newest, note, record, site, step, tap
from engine.timing import in_turns
from engine.toyland import Grammar, batch
from lessons.models import TOY, load, name_ids, read_aloud
from lessons.texts import TEXTS
from lessons.views import Arithmetic

LENGTH, ROWS, UNSEEN_ROWS = 32, 8, 64
RATE = 1e-2  # of learning, for all
STRIDE = 20  # steps of training that are one of the page, after the race
SAY, EVERY, SHOWN = 14, 6, 10  # words that each goes on to say; steps between two looks; words of a distribution
WARMTH = (0.5, 1.0, 1.5, 2.0, 4.0, 8.0)  # temperatures that one can look at
READERS = ("truth", "teacher", *WAYS)
NARROWER = {"toy": 3, "smollm2": 8}
ALPHAS, HEATS = (0.0, 0.5, 1.0), (1.0, 2.0, 4.0, 8.0)  # of the map
LONGER, SPECIAL = 2.4, {"temperature": 4.0, "alpha": 0.5}  # the specialist's steps, as many times; its loss

CURVE = site("distil.curve", "surprisal of texts that no student was trained on", low=0.0, unit="nats a word")
AT = site("distil.at", "steps of training so far")
HEARD = site("distil.heard", "how little each reader expected each word", symbol="−ln p", low=0.0, unit="nats")
SAYS = site("distil.logits", "what a reader says at each place, before the softmax", symbol="z")
TRUTH = site("distil.truth", "the odds that Toyland itself gives these words", low=0.0, high=1.0)
LABEL = site("distil.label", "what the text says: 1 for the word that came", low=0.0, high=1.0)
CONTEXT = site("distil.context", "the text up to this word")
SAID = site("distil.said", "how each of them goes on")
PROMPT = site("distil.prompt", "the text that all of them go on from")
RIGHT = site("distil.right", "share of the questions’ words that come first", low=0.0, high=1.0)
MATCHED = site("distil.matched", "how alike the matched layers are, their mean", symbol="CKA", low=0.0, high=1.0)
TIMES = site("distil.times", "how many times less the student takes", low=0.0)
TAKES = site("distil.takes", "what one more token takes")
WORDS, SOFT, ENTROPY = logits.WORDS, logits.SOFT, logits.ENTROPY


def open_school(knobs: Any) -> tuple[School, Any]:
    """Teacher, texts and the shape of the students, as the knobs say."""
    teacher, tokenizer = load(knobs.model, dtype="float32")
    teacher.requires_grad_(False)
    plan = Plan(
        steps=knobs.steps, rows=ROWS, length=LENGTH, rate=RATE, temperature=knobs.temperature, alpha=knobs.alpha,
        seeds=tuple(range(knobs.seeds)), look=EVERY, corpus=256, unseen_rows=UNSEEN_ROWS,
    )  # fmt: skip
    if knobs.model == TOY:
        grammar = Grammar().only(knobs.task)
        unseen = batch(grammar, seed=0, step=0, rows=UNSEEN_ROWS, length=LENGTH, stream="test")
        shape = small(teacher.shape, layers=knobs.layers, narrower=knobs.narrower)
        told = toyland(plan, grammar, texts=knobs.texts)
        words = tuple(range(tokenizer.size))
        return School(teacher, shape, plan, told, unseen, words, grammar=grammar, count=knobs.texts), tokenizer
    shape = small(teacher.shape, layers=knobs.layers, narrower=NARROWER["smollm2"])
    ids = [tokenizer.encode(words) for words in TEXTS.values()]
    return of_texts(teacher, shape, replace(plan, corpus=32), ids, most=knobs.texts), tokenizer


def reads(school: School) -> str:
    """What the students read, in words."""
    if school.grammar is None:
        return f"{school.count} stretches of three short texts"
    return f"{school.count} texts" if school.count else "ever new texts"


class Watch:
    """Shows the page what teacher and students say of one unseen text, while they learn."""

    def __init__(self, school: School, tokenizer: Any) -> None:
        self.school, self.tokenizer = school, tokenizer
        self.row, self.asked = school.story()
        self.ids = school.unseen.ids[self.row]
        self.names = np.array(school.names)
        self.count, self.real = 0, school.grammar is None
        device = school.teacher.embed.weight.device
        self.unseen = school.unseen.ids.to(device)
        self.taught = school.teach(self.ids[None, :-1].to(device)).logits[0].float()  # token word
        self.odds = school.odds(self.ids[:-1])
        self.heard = np.full((len(READERS), LENGTH - 1), np.nan, np.float32)
        self.places = self._places()
        self._open()

    def _places(self) -> list[int]:
        """Three words of the text, none the first: about ten could come, two or three could, one must."""
        choices = np.exp([float(-(p * p.log()).sum()) for p in self.taught.softmax(-1)])  # as many as even odds
        many, few = (1 + int(np.abs(np.log(choices[1:] / wanted)).argmin()) for wanted in (10.0, 2.5))
        answers = np.flatnonzero(self.school.unseen.answers[self.row].numpy())
        return [many, few, int(answers[0]) - 1 if len(answers) else 1 + int(choices[1:].argmin())]

    def _open(self) -> None:
        pieces = self.tokenizer.pieces(self.names[self.ids.numpy()].tolist())
        read_aloud(pieces[1:])
        name_ids(self.tokenizer, self.names)
        came = self.ids[1:].numpy()
        if self.school.grammar is not None:
            self.heard[0] = -np.log(np.maximum(self.odds[np.arange(len(came)), came], 1e-12))
        self._listen("teacher", self.taught)
        tap(HEARD, self.heard.copy(), "reader token")
        for place, at in enumerate(self.places):
            words = self.words(at)
            tap(TRUTH, self.odds[at, words].astype(np.float32), "word", place=place)
            tap(LABEL, (words == came[at]).astype(np.float32), "word", place=place)
            tap(CONTEXT, self.names[self.ids[1 - self.real : at + 1].numpy()].astype(np.int32), "token", place=place)
        tap(PROMPT, self.names[self.ids[1 - self.real : self.asked].numpy()].astype(np.int32), "token")
        tap(CONTEXT, self.names[self.ids[1 - self.real :].numpy()].astype(np.int32), "token", place="end")
        told = [self.tokenizer.decode(self.names[self.ids[1 : at + 1].numpy()].tolist()) for at in self.places]
        after = [i for i in self.words(self.places[2]).tolist() if i != int(came[self.places[2]])][:3]
        runners = "”, “".join(piece.strip() for piece in self.tokenizer.pieces(self.names[after].tolist()))
        exact = [int((self.odds[at] > 0).sum()) for at in self.places]
        note(
            contexts=told, runners=f"“{runners}”", open=exact, came=[pieces[at + 1].strip() for at in self.places],
            words=len(self.names), places=self.places, story=self.ids.tolist(),
            story_words=[piece.strip() for piece in pieces], temperature=self.school.plan.temperature,
            alpha=self.school.plan.alpha,
        )  # fmt: skip
        phase("doubts")
        step(label="the teacher reads")

    def words(self, at: int) -> np.ndarray:
        """The words that are shown at a place: the teacher's likeliest, and the one that came."""
        top = self.taught[at].topk(SHOWN).indices.cpu().numpy()
        came = int(self.ids[at + 1])
        return top if came in top else np.append(top[:-1], came)

    def _listen(self, name: str, said: Any) -> None:
        """Keep what a reader says of the text, and tap its odds where the page looks."""
        came = self.ids[1:].to(said.device)
        self.heard[READERS.index(name)] = -said.log_softmax(-1).gather(1, came[:, None])[:, 0].cpu().numpy()
        tap(SAYS, said, "token word", reader=name)
        for place, at in enumerate(self.places):
            words = self.words(at)
            p = np.stack([logits.soft(said[at].double(), temperature=t).cpu().numpy() for t in WARMTH])
            doubt = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)  # of each temperature
            tap(WORDS, self.names[words].astype(np.int32), "word", place=place, reader=name)
            tap(ENTROPY, doubt.astype(np.float32), "temperature", place=place, reader=name)
            tap(SOFT, p[:, words].astype(np.float32), "temperature word", place=place, reader=name)

    def levels(self) -> None:
        """The teacher's surprisal of all unseen texts, and the least there is."""
        said = self.school.expects(self.unseen[:, :-1], rows=ROWS)
        came = self.unseen[:, 1:]
        self.teacher = float(-said.log_softmax(-1).gather(-1, came[..., None]).mean())
        self.floor = float(self.school.unseen.nats[:, 1:].mean()) if self.school.grammar else float("nan")
        self.recall = recall(said, self.school.unseen)
        note(teacher=self.teacher, floor=self.floor)

    def show(self, students: Mapping[tuple[str, int], Any], at: int) -> None:
        """The curves so far; what each student says of the text, and how it goes on."""
        seeds = sorted({seed for _, seed in students})
        for way in WAYS:
            nats = [float(newest(UNSEEN, way=way, seed=seed)) for seed in seeds]  # type: ignore[arg-type]
            for of, value in (("mean", np.mean(nats)), ("low", min(nats)), ("high", max(nats))):
                tap(CURVE, float(value), "", way=way, of=of)
            tap(AT, at, "", of=way)
        for name, value in (("teacher", self.teacher), ("floor", self.floor)):
            tap(CURVE, value, "", way=name, of="mean")
        with aside():
            heard = {way: students[way, seeds[0]].model(self._text())[0].float() for way in WAYS}
        for way, said in heard.items():
            self._listen(way, said)
            rows = newest(layers.ALIGNMENT, way=way)
            pairs = students[way, seeds[0]].g
            if rows is not None:
                tap(MATCHED, float(np.mean([rows[m, n] for m, n in enumerate(pairs)])), "", way=way)
        tap(HEARD, self.heard.copy(), "reader token")
        if self.count % 4 == 0 or at == self.school.plan.steps:
            for way in WAYS:
                self._say(way, students[way, seeds[0]].model)
        self.count += 1

    def _text(self) -> Any:
        return self.ids[None, :-1].to(self.unseen.device)

    def _say(self, name: str, model: Any) -> None:
        """How it goes on from the prompt, always with the likeliest word; and how many questions it gets right."""
        teaches = name == "teacher"
        said = self.school.on(self.ids[: self.asked], model, words=SAY, whole=teaches)
        if teaches:
            right = self.recall
        else:
            with aside():
                right = recall(model(self.unseen[:, :-1]).float(), self.school.unseen)
        tap(SAID, self.names[said].astype(np.int32), "token", reader=name)
        tap(RIGHT, right, "", reader=name)


def phase(name: str) -> None:
    event("distil.phase", phase=name)


def race(school: School, watch: Watch) -> None:
    """The four, side by side."""
    phase("race")
    watch.levels()
    watch._say("teacher", school.teacher)
    distil(
        school.teacher, school.shape, school.plan, texts=school.texts, unseen=school.unseen, teach=school.teach,
        write=school.write, look=watch.show,
    )  # fmt: skip


def map_plan(plan: Plan) -> Plan:
    """How each cell of the map is trained: half as long as the four, one seed."""
    return replace(plan, steps=max(10, plan.steps // 2), look=STRIDE, seeds=(0,))


def mapped(school: School) -> None:
    """α and T, a cell after the other."""
    phase("map")
    plan = map_plan(school.plan)
    note(map_steps=plan.steps)
    over(
        school.teacher, school.shape, plan, alphas=ALPHAS, temperatures=HEATS, texts=school.texts,
        unseen=school.unseen, teach=school.teach,
    )  # fmt: skip


def steps_of(school: School) -> int:
    """How many steps the page will have."""
    plan, cells = school.plan, (len(ALPHAS) - 1) * len(HEATS) + 1
    special = -(-int(LONGER * plan.steps) // STRIDE) if school.grammar else 1
    return 1 + plan.steps + cells * -(-map_plan(plan).steps // STRIDE) + special


def specialist(school: School, watch: Watch) -> None:
    """Longer, on texts of this one task without end, with half an eye on the right words: can it beat its teacher?"""
    phase("specialist")
    plan = replace(
        school.plan, steps=int(LONGER * school.plan.steps), look=STRIDE, temperature=SPECIAL["temperature"],
        alpha=SPECIAL["alpha"],
    )  # fmt: skip

    def look(students: Mapping[tuple[str, int], Any], at: int) -> None:
        nats = [surprisal(student.model, watch.unseen) for student in students.values()]
        for of, value in (("mean", np.mean(nats)), ("low", min(nats)), ("high", max(nats))):
            tap(CURVE, float(value), "", way="specialist", of=of)
        tap(AT, at, "", of="specialist")
        for name, value in (("teacher", watch.teacher), ("floor", watch.floor)):
            tap(CURVE, value, "", way=name, of="special")
        note(special=nats, special_steps=plan.steps)

    if school.grammar is None:
        tap(CURVE, float("nan"), "", way="specialist", of="mean")
        step(label="no endless texts here")
        return
    told = toyland(plan, school.grammar)
    distil(
        school.teacher, school.shape, plan, ways=("soft",), texts=lambda seed, at: told(0, at), unseen=school.unseen,
        teach=school.answer, look=look, told=False, stride=STRIDE,
    )  # fmt: skip


def _go_on(model: Any, ids: list[int]) -> None:
    list(generate(model, ids, steps=16))


def weigh(school: School) -> None:
    """What a token takes: counted from the shapes, and timed."""
    teacher, small_one = school.teacher, Decoder(school.shape, seed=0).to(school.teacher.embed.weight.device)
    ids = {"teacher": [1, 2, 3, 4], "student": [1, 2, 3, 4]}
    models = {"teacher": teacher, "student": small_one.requires_grad_(False)}
    with record(keep={}):
        took = in_turns(
            {name: functools.partial(_go_on, model, ids[name]) for name, model in models.items()}, rounds=3,
            where=teacher.embed.weight.device,
        )  # fmt: skip
    seconds = {name: min(times) / 16 for name, times in took.items()}
    times = saving(teacher.shape, school.shape, context=LENGTH) | {"time": seconds["teacher"] / seconds["student"]}
    tap(TIMES, np.array([times[k] for k in ("parameters", "flops", "bytes", "time")], np.float32), "kind")
    for name, shape in (("teacher", teacher.shape), ("student", school.shape)):
        counts = {
            "parameters": cost.parameter_count(shape), "products": cost.decode_flops(shape, context=LENGTH) // 2,
            "bytes": cost.decode_bytes(shape, context=LENGTH), "ms": 1e3 * seconds[name],
        }  # fmt: skip
        for kind, value in counts.items():
            tap(TAKES, float(value), "", of=name, kind=kind)
    note(times=times)


def loss_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """One word for one reader: surprisal, and for a student the loss that it makes."""
    name, token = READERS[at["reader"]], at["token"]
    when = at.get("step")
    meta = recording.meta
    came, word = meta["story"][token + 1], meta["story_words"][token + 1]
    if name == "truth":
        nats = float(recording.track(HEARD).latest(when)[0, token])
        return Arithmetic(
            title=f"Toyland’s own odds of “{word}”",
            note="Exact: the grammar says so. No reader does better on average.",
            lines=(("probability", f"{np.exp(-nats):.4f}"), ("−ln p", f"{nats:.3f} nats")), values={"nats": nats},
        )  # fmt: skip
    z = _says(recording, name, when)[token]
    own = _soft(z, 1.0)
    lines = [(f"p(“{word}”) = softmax(z)", f"{own[came]:.4f}"), ("CE = −ln p", f"{-np.log(own[came]):.3f}")]
    if name == "teacher":
        return Arithmetic(title=f"The teacher on “{word}”", lines=tuple(lines), note="Its doubts are the soft labels.",
                          vectors=(("its odds", tuple(own[np.argsort(-own)[:16]].tolist())),),
                          values={"nats": float(-np.log(own[came]))})  # fmt: skip
    T, alpha, v = meta["temperature"], meta["alpha"], _says(recording, "teacher", when)[token]
    p, q = _soft(v, T), _soft(z, T)
    kl = float((p * (np.log(p) - np.log(q))).sum())
    ce = float(-np.log(own[came]))
    total = alpha * T * T * kl + (1 - alpha) * ce
    lines += [(f"KL(teacher ‖ student), both at T = {T:g}", f"{kl:.4f}"), (f"× T² = {T * T:g}", f"{T * T * kl:.4f}")]
    if name in ("soft", "layers"):
        lines.append((f"{alpha:g} × {T * T * kl:.4f} + {1 - alpha:.2g} × {ce:.3f}", f"{total:.4f}"))
    note_ = {
        "hard": "This student is told CE alone. What KL says of the other words never reaches it.",
        "soft": "Summed over the words, then the mean over places. Divided by the vocabulary too, it would vanish.",
        "layers": "To this come the differences of hidden states and of attention scores.",
        "synthetic": "This student reads texts of the teacher’s own, never this kind. There, CE is its loss.",
    }[name]
    order = np.argsort(-p)[:16]
    return Arithmetic(
        title=f"A student on “{word}”", lines=tuple(lines), note=note_,
        vectors=((f"teacher at T = {T:g}", tuple(p[order].tolist())), ("student", tuple(q[order].tolist()))),
        values={"kl": kl, "ce": ce, "total": total},
    )  # fmt: skip


def _says(recording: Recording, reader: str, when: int | None) -> np.ndarray:
    if not recording.has(SAYS, reader=reader):
        raise ValueError("Nothing has been said here yet: training begins later.")
    try:
        return recording.track(SAYS, reader=reader).latest(when).astype(np.float64)
    except KeyError:
        raise ValueError("Nothing has been said here yet: training begins later.") from None


def _soft(z: np.ndarray, temperature: float) -> np.ndarray:
    e = np.exp((z - z.max()) / temperature)
    return np.maximum(e / e.sum(), 1e-30)
