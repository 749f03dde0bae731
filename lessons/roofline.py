"""Waiting for memory: is the machine that writes a token busy computing, or is it waiting for its weights?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine import cost, hardware
from engine.profile import OPERATIONS, Profile, profile
from engine.recording import Recording, note, site, step, tap
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, choice, load
from lessons.views import Arithmetic, Bars, Curves, Facing, Line, Number, Numbers, Plane, Points, of

RATE = site("roofline.rate", "floating-point operations a second", grows="batch", low=0.0)
INTENSITY = site("roofline.intensity", "floating-point operations for each byte that must be moved", grows="batch")
SHARE = site("roofline.share", "share of the operations' time in one decode step", low=0.0, high=1.0)
ROOF_X = site("roofline.roof_x", "FLOPs a byte, along the roof")
ROOF = site("roofline.roof", "the roof over weights where they sit: min(peak, intensity · bandwidth)", unit="FLOP/s")
FAR_ROOF = site("roofline.far_roof", "the roof over weights that come from main memory", unit="FLOP/s")
MEDIAN = site("roofline.median", "time of the median decode step", unit="ms")
BEST = site("roofline.best", "time of the quickest decode step", unit="ms")
SPREAD = site("roofline.spread", "the slowest decode step over the quickest")
MOVING = site(
    "roofline.moving", "time that moving the bytes of a decode step takes at the measured bandwidth", unit="ms"
)
COMPUTING = site("roofline.computing", "time that its FLOPs take at the measured peak", unit="ms")
SPEED = site("roofline.speed", "new tokens a second, all texts together, by the quickest step", unit="tokens/s")
BOUND = site("roofline.bound", "tokens a second that bandwidth and peak allow", unit="tokens/s")
WAITS = site("roofline.waits", "time to move the bytes of a layer's operations, and of the head", unit="µs")
WORKS = site("roofline.works", "time to compute their FLOPs", unit="µs")
ENERGY = site(
    "roofline.energy", "millijoules of a decode step at 45 nm: arithmetic, memory low, memory high", unit="mJ"
)
SIZE = site("roofline.batch", "texts decoded at once")

WHOLE = "whole pass"
SHOWN = ("qkv", "attention", "out", "ffn", "head")  # what has FLOPs
POINTS = (*SHOWN, WHOLE)
FAR = 0.2  # of the roof: what reaches less was held up by something else
PHASES = ("decode", "prefill")
AT_ONCE = {"real": 192, "toy": 4096, "cuda": 65536}  # tokens of a prefill that are worth waiting for


class Turn(Knobs):
    model = choice()
    batch = param.Integer(32, bounds=(1, 64), label="Largest batch", doc="Texts at once: from 1, doubling up to this.")
    prompt = param.Integer(48, bounds=(8, 256), label="Prompt length", doc="Tokens read before, or all at once.")
    dtype: param.Selector = param.Selector(
        default="float32", objects=["float32", "bfloat16"], label="Number format", doc="4 or 2 bytes a weight."
    )
    device: param.Selector = param.Selector(
        default=hardware.devices()[0], objects=list(hardware.devices()), label="Device", doc="What this server has."
    )


def run(knobs: Turn) -> None:
    model, _ = load(knobs.model, dtype=knobs.dtype, device=knobs.device)
    weight = model.embed.weight
    size = sum(p.nbytes for p in model.parameters())
    level = hardware.holder(size, weight.device)
    far = hardware.bandwidth(weight.device)
    near = far if level.name == "memory" else hardware.bandwidth(weight.device, size=size)
    peak = hardware.flops(weight.dtype, weight.device)
    machine = hardware.describe()
    batches = sizes(knobs.batch)
    note(
        weights=size, value_bytes=weight.element_size(), level=level.name, near=near, far=far, peak=peak,
        batches=batches, prompt=knobs.prompt, dtype=knobs.dtype, device=knobs.device, total_steps=len(batches),
        machine=machine.gpu if knobs.device == "cuda" else machine.cpu, cores=machine.cores, layers=model.shape.layers,
    )  # fmt: skip
    x = np.geomspace(0.1, 2000.0, 64)
    tap(ROOF_X, x, "place")
    tap(ROOF, np.minimum(peak, x * near), "place")
    tap(FAR_ROOF, np.minimum(peak, x * far), "place")
    most = AT_ONCE["cuda" if knobs.device == "cuda" else "toy" if knobs.model == TOY else "real"]
    for batch in batches:
        decode = profile(model, phase="decode", batch=batch, tokens=knobs.prompt, least=2)
        prefill = None
        if batch == 1 or batch * knobs.prompt <= most:
            prefill = profile(model, phase="prefill", batch=batch, tokens=knobs.prompt, least=1, budget=0.1)
        _show(decode, prefill, near, peak, model.shape.layers)
        step(label=f"batch {batch}")


def sizes(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return [*(2**i for i in range(10) if 2**i < most), most]


def _show(decode: Profile, prefill: Profile | None, near: float, peak: float, layers: int) -> None:
    """What a page shows of one batch size."""
    placed = np.full((2, 1, 2, len(POINTS)), np.nan)  # rate and intensity, batch, phase, operation
    for i, found in enumerate((decode, prefill)):
        if found is not None:
            placed[:, 0, i] = _points(found)
    tap(RATE, placed[0], "batch phase operation")
    tap(INTENSITY, placed[1], "batch phase operation")
    moving, computing = decode.bytes / near, decode.flops / peak
    seconds = np.array(decode.seconds)
    tap(SHARE, seconds / seconds.sum(), "operation")
    tap(MEDIAN, decode.whole * 1e3, "")
    tap(BEST, decode.best * 1e3, "")
    tap(SPREAD, decode.spread, "")
    tap(MOVING, moving * 1e3, "")
    tap(COMPUTING, computing * 1e3, "")
    tap(SPEED, decode.batch / decode.best, "")
    tap(BOUND, decode.batch / max(moving, computing), "")
    tap(WAITS, _a_layer(np.array([w.bytes / near for w in decode.work if w.flops]), layers), "row")
    tap(WORKS, _a_layer(np.array([w.flops / peak for w in decode.work if w.flops]), layers), "row")
    spent = cost.energy(decode.flops, decode.bytes)
    tap(ENERGY, 1e3 * np.array([spent.arithmetic, spent.memory_low, spent.memory_high]), "part")
    tap(SIZE, decode.batch, "")


def _a_layer(seconds: np.ndarray, layers: int) -> np.ndarray:
    """Microseconds of one layer's four operations, of the whole layer and of the head."""
    parts = seconds[:-1] / layers
    return 1e6 * np.array([*parts, parts.sum(), seconds[-1]])


def _points(found: Profile) -> np.ndarray:
    """FLOP/s and FLOPs a byte of each operation that has FLOPs, and of the quickest whole pass."""
    pairs = [(w, s) for w, s in zip(found.work, found.seconds, strict=True) if w.flops]
    rates = [w.flops / s for w, s in pairs] + [found.flops / found.best]
    return np.array([rates, [w.intensity for w, _ in pairs] + [found.flops / found.bytes]])


def facts(recording: Recording) -> dict[str, Any]:
    m = recording.meta
    intensity, rate = recording.stack(INTENSITY), recording.stack(RATE)
    best, median, spread = (recording.stack(name) for name in (BEST, MEDIAN, SPREAD))
    ridge = cost.ridge_point(m["peak"], m["near"])
    energy = recording.stack(ENERGY)[0]
    ffn, attention, whole = (POINTS.index(name) for name in ("ffn", "attention", WHOLE))
    share = recording.stack(SHARE)[0]
    return {
        "machine": m["machine"],
        "cores": m["cores"],
        "level": where_is(m["level"], m["device"]),
        "weights": m["weights"] / 1e6,
        "near": m["near"] / 1e9,
        "far": m["far"] / 1e9,
        "seat": seat(m),
        "peak": m["peak"] / 1e9,
        "ridge": ridge,
        "batch": m["batches"][-1],
        "prompt": m["prompt"],
        # A weight of so many bytes makes 2 FLOPs for each text: the batch at which its products reach the ridge.
        "turn": int(np.ceil(ridge * m["value_bytes"] / 2)),
        "one": float(intensity[0, 0, whole]),
        "ffn_one": float(intensity[0, 0, ffn]),
        "ffn_last": float(intensity[-1, 0, ffn]),
        "attention_one": float(intensity[0, 0, attention]),
        "attention_last": float(intensity[-1, 0, attention]),
        "prefill": float(intensity[0, 1, whole]),
        "prefill_faster": float(rate[0, 1, whole] / rate[0, 0, whole]),
        "bound": m["near"] / m["weights"],
        "best_speed": float(1e3 / best[0]),
        "median_speed": float(1e3 / median[0]),
        "spread": float(spread.max()),
        "gain": float((m["batches"][-1] / best[-1]) * best[0]),
        "slower": float(best[-1] / best[0]),
        "arithmetic": float(energy[0]),
        "memory_low": float(energy[1]),
        "memory_high": float(energy[2]),
        "times_low": float(energy[1] / energy[0]),
        "times_high": float(energy[2] / energy[0]),
        "longest": OPERATIONS[int(share.argmax())],
        "longest_share": float(share.max()),
        "last": recording.steps - 1,
        "prefills": int(np.isfinite(rate[:, 1, 0]).sum()) - 1,
    }


def seat(m: Mapping[str, Any]) -> str:
    """Where the weights come from, in a sentence."""
    if m["level"] == "memory":
        return f"In {where_is('memory', m['device'])}, for no cache here holds them."
    times = m["near"] / m["far"]
    return f"In {where_is(m['level'], m['device'])}, which is read {times:.1f} times as fast as main memory."


def where_is(level: str, device: str) -> str:
    """A level's name as one says it."""
    if level == "memory":
        return "the GPU’s memory" if device == "cuda" else "main memory"
    return f"the {level} cache"


def marks(recording: Recording) -> list[Mark]:
    turn = facts(recording)["turn"]
    past = [i for i, batch in enumerate(recording.meta["batches"]) if batch >= turn]
    return [Mark(past[0], "the products with weights reach the ridge")] if past else []


def _bound_by_memory(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['one']:.2f} FLOPs a byte at batch 1; ridge {f['peak']:.0f} / {f['near']:.0f} = {f['ridge']:.2f}"
    low = f["one"] < f["ridge"]
    why = f"The weights, {f['weights']:.1f} MB, sit in {f['level']}, which is read at {f['near']:.0f} GB/s."
    return Finding(f"{f['one']:.2f} against {f['ridge']:.2f}", "agrees" if low else "differs", why, filled)


def _energy(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['arithmetic']:.3g} mJ; {f['memory_low']:.3g} to {f['memory_high']:.3g} mJ, were all read from DRAM"
    why = "A proportion by a table of 2014, not what this machine draws."
    if recording.meta["level"] != "memory":
        why += f" This model’s weights stay in {f['level']}, which costs less."
    far = f["times_low"] > 10
    return Finding(f"{f['times_low']:.0f} to {f['times_high']:.0f}×", "agrees" if far else "differs", why, filled)


def _cannot_exceed(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['near']:.1f} GB/s / {f['weights']:.1f} MB = {f['bound']:.0f}; quickest {f['best_speed']:.0f}"
    below = f["best_speed"] <= f["bound"]
    why = f"{f['best_speed'] / f['bound']:.0%} of it; the median step reaches {f['median_speed']:.0f} tokens/s."
    if not below:
        why = "Faster than the bandwidth that was measured: other work on this machine slowed that measurement."
    return Finding(f"{f['best_speed']:.0f} ≤ {f['bound']:.0f}", "agrees" if below else "differs", why, filled)


# fmt: off
CLAIMS = (
    Claim(
        "With batch 1 each parameter is used once, so decode is memory-bound", "lecture; Williams 2009",
        "FLOPs / bytes < peak / bandwidth", "below the ridge", _bound_by_memory, "FLOPs a byte",
    ),
    Claim(
        "A memory access costs far more energy than arithmetic", "lecture; Horowitz 2014",
        "bytes / 8 · DRAM read against FLOPs / 2 · (multiply + add)", "3.7 pJ against 1.3 to 2.6 nJ *", _energy,
    ),
    Claim(
        "Decoding cannot write more tokens a second than bandwidth / bytes of weights", "lecture",
        "bandwidth / weights", "bound", _cannot_exceed, "tokens/s",
    ),
)
# fmt: on


def point_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """One point of the roofline: counted FLOPs and bytes, the time that they took, and the roof above it."""
    i, phase, operation = at["batch"], at["phase"], at["operation"]
    m = recording.meta
    rate = float(recording.stack(RATE)[i, phase, operation])
    intensity = float(recording.stack(INTENSITY)[i, phase, operation])
    if not np.isfinite(rate):
        raise ValueError("a prefill of so many tokens was not run")
    roof = cost.attainable_flops(intensity, flops_per_second=m["peak"], bytes_per_second=m["near"])
    batch, tokens = m["batches"][i], m["prompt"]
    tall = "memory" if intensity < cost.ridge_point(m["peak"], m["near"]) else "arithmetic"
    notes = (
        f"Limited by {tall}." if rate > FAR * roof else "Far below: starting it took longer than moving and computing.",
        "Every text has its own cache: a batch shares none." if POINTS[operation] == "attention" else "",
    )
    reads = "one token each" if phase == 0 else f"{tokens} tokens each"
    return Arithmetic(
        title=f"{POINTS[operation]}, {PHASES[phase]}: {batch} × {reads}",
        lines=(
            ("FLOPs a byte", f"{intensity:.3g}"),
            ("FLOPs a second", f"{rate / 1e9:.2f} G"),
            (f"roof: {intensity:.3g} · {m['near'] / 1e9:.1f}, at most {m['peak'] / 1e9:.0f} G", f"{roof / 1e9:.2f} G"),
            ("reached of it", f"{rate / roof:.0%}"),
        ),
        note=" ".join(filter(None, notes)),
        vectors=(
            ("FLOPs a byte, by batch", tuple(recording.stack(INTENSITY)[:, phase, operation].tolist())),
        ) if phase == 0 else (),
        values={"rate": rate, "intensity": intensity, "roof": roof},
    )  # fmt: skip


# fmt: off
BEATS = (
    Beat(
        "To write one token, {name} fetches all its weights and uses each of them once. Is the machine computing, or "
        "waiting? ==Each point|roof== is one operation of this very run: how fast it computed (upwards), and how "
        "much for each byte that it had to fetch (to the right).", scene="roof", step=0, focus="roof",
        notes="The points are measured while the page runs, on a machine that may be busy.",
    ),
    Beat(
        "No point can stand above ==the roof|roof==. Its slope is what memory delivers, {near:.0f} GB a second; its "
        "flat top what arithmetic manages, {peak:.0f} GFLOP a second. They meet at the [[ridge]]: {ridge:.1f} FLOPs a "
        "byte. Left of it, an operation waits. At batch 1, a step has {one:.2f}.", scene="roof", step=0, focus="roof",
    ),
    Beat(
        "Click a point: its FLOPs for a byte, its speed, its roof. Most of ==the time|share==, {longest_share:.0%}, "
        "goes into {longest}. A point far below the roof waits for neither: starting such a small operation takes "
        "longer than doing it.", scene="roof", step=0, do=Do("Open a point’s arithmetic", cell="roof"),
    ),
    Beat(
        "Now let several texts write at once. A weight is fetched once and used for all of them: twice the texts, "
        "twice the FLOPs for each byte.", scene="roof", step=0,
        predict=Predict(
            "From which [[batch]] on do the products with weights stop waiting for memory, here?", (2, 10, 50, 250),
            "turn", format=".0f", unit="texts",
        ),
    ),
    Beat(
        "At {turn} texts. ==The points|roof== slide to the right and climb, and one stays behind: attention, at "
        "{attention_last:.2f} FLOPs a byte as before. Every text has a cache of its own, and a larger batch shares "
        "none of it.", scene="roof", step="last", play=True, focus="roof",
    ),
    Beat(
        "Reading a prompt is a batch, too: its {prompt} tokens use each weight {prompt} times. So ==prefill|roof== "
        "stands far to the right, at {prefill:.0f} FLOPs a byte, and computes {prefill_faster:.0f} times as fast as "
        "decoding does. The same weights, the same machine.", scene="roof", step=0, focus="roof",
    ),
    Beat(
        "Each operation has two clocks: ==moving its bytes|sides== and computing its FLOPs. The longer one is a "
        "[[floor]]. One text could get {bound:.0f} tokens a second and gets {best_speed:.0f}; {batch} texts take "
        "{slower:.1f} times as long. This machine is shared: some steps took {spread:.1f} times as long as "
        "==the quickest|floors==.",
        scene="floors", step="last", play=True, focus="sides",
    ),
    Beat(
        "Where do {weights:.0f} MB of weights sit? {seat} That decides [[which roof]] counts. And ==energy|energy==: "
        "by a table of 2014, fetching this step’s bytes from DRAM would cost {times_low:.0f} to {times_high:.0f} times "
        "what its arithmetic does. A proportion, not a meter.",
        scene="floors", step=0, focus="energy",
    ),
    Beat(
        "Break it: find settings in which a bigger batch no longer helps. A long prompt and 64 texts make attention "
        "the longest operation. In bfloat16, half the bytes, the same FLOPs: does the step take half the time?",
        scene="floors", step="last", do=Do("Change the number format", knob="dtype"),
    ),
)

GLOSSARY = {
    "floor": "A time that nothing can be shorter than: all bytes at the measured bandwidth, all FLOPs at the measured "
    "peak.",
    "ridge": "Where slope and flat top meet: peak FLOPs a second over bytes a second. Left of it memory is the limit, "
    "right of it arithmetic.",
    "batch": "Texts that are written at the same time, a token each in every step.",
    "which roof": "A CPU’s caches are faster than its memory. Weights that fit into one are read from there again "
    "and again, and the slope is steeper. The dashed line is main memory.",
}


def group(phase: int, colour: str) -> Points:
    return Points(
        PHASES[phase], of(INTENSITY, phase=phase), of(RATE, phase=phase), colour=colour,
        names=POINTS if phase == 0 else tuple(f"{name}, prefill" for name in POINTS),
    )


ENERGY_BARS = Bars(
    name="energy", title="Energy of this step at 45 nm, in mJ", span=5, origin="formula", values=of(ENERGY),
    labels=("arithmetic", "DRAM, low", "DRAM, high"), colour="alarm", format=",.2f", high=None,
    note="Horowitz 2014: a proportion, not what this machine draws",
)
SCENES = (
    Scene(
        "roof",
        (
            Plane(
                name="roof", title="Operations under the roof", span=7, note="prefill at small batches only",
                height=380, log=True, log_x=True,
                points=(group(0, "query"), group(1, "key")), tensor=of(RATE), cell=point_cell,
                lines=(
                    Line("roof", of(ROOF), colour="ink", x=of(ROOF_X)),
                    Line("main memory", of(FAR_ROOF), colour="kept", dashed=True, x=of(ROOF_X)),
                ),
                x_label="FLOPs a byte", y_label="FLOPs a second",
            ),
            Bars(
                name="share", title="Where a decode step’s time goes", span=5, values=of(SHARE), labels=OPERATIONS,
                colour="query",
            ),
            Numbers(
                name="now", title="This step", span=12,
                numbers=(
                    Number("Texts at once", of(SIZE)),
                    Number("Quickest step", of(BEST), unit="ms", format=",.2f", colour="query"),
                    Number("Median step", of(MEDIAN), unit="ms", format=",.2f"),
                    Number("Slowest / quickest", of(SPREAD), unit="×", format=".1f"),
                    Number("Tokens a second", of(SPEED), colour="query"),
                    Number("At most", of(BOUND)),
                ),
            ),
        ),
    ),
    Scene(
        "floors",
        (
            Facing(
                name="sides", title="One layer: moving its bytes, computing its FLOPs", span=7, left=of(WAITS),
                right=of(WORKS), labels=(*SHOWN[:-1], "one layer", "head"), left_label="moving its bytes",
                right_label="computing its FLOPs", unit="µs", note="µs, by the measured bandwidth and peak",
                format=",.1f",
            ),
            ENERGY_BARS,
            Curves(
                name="floors", title="A decode step, and what it cannot be faster than", span=7,
                lines=(
                    Line("median step", of(MEDIAN), colour="kept", x=of(SIZE)),
                    Line("quickest step", of(BEST), colour="query", x=of(SIZE)),
                    Line("moving its bytes", of(MOVING), colour="key", dashed=True, x=of(SIZE)),
                    Line("computing its FLOPs", of(COMPUTING), colour="value", dashed=True, x=of(SIZE)),
                ),
                x_label="texts at once", y_label="ms", log=True, log_x=True, format=".2f",
            ),
            Curves(
                name="speed", title="Tokens a second, all texts together", span=5,
                lines=(
                    Line("at most", of(BOUND), colour="ink", dashed=True, x=of(SIZE)),
                    Line("measured", of(SPEED), colour="query", x=of(SIZE)),
                ),
                x_label="texts at once", log=True, log_x=True, format=",.0f",
            ),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"roofline.*": {}, "profile.*": {}}


LESSON = Lesson(
    slug="roofline",
    title="Waiting for memory",
    question="Is the machine busy computing, or waiting?",
    part="Where the time goes",
    order=2,
    sources=("lecture", "Williams 2009, doi:10.1145/1498765.1498785", "Horowitz 2014, ISSCC"),
    knobs=Turn,
    run=run,
    keep=keep,
    beats=BEATS,
    scenes=SCENES,
    claims=CLAIMS,
    code=("engine.profile:profile", "engine.cost:forward_work", "engine.hardware:bandwidth"),
    facts=facts,
    marks=marks,
    glossary=GLOSSARY,
    step_word="batch size",
    seconds=300,
    footnote="* A 32-bit multiplication and a 64-bit read of DRAM at 45 nm, as reported. Measured: this server, now.",
)
