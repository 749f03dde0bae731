"""One token at a time: what a model rereads to say one more word, and what it keeps so that it needn't."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import param

from engine import cost
from engine.caches.full import Full
from engine.generate import generate, multiplications
from engine.recording import Recording, newest, note, site, tap
from lessons.arithmetic import attention_cell
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, choice, load, name_ids, read_aloud
from lessons.views import Bars, Curves, Heatmaps, Line, Number, Numbers, Slots, Strip, Tokens, knob, of

SLOTS = site("decode.slots", "what the cache holds, slot by slot")
FIRST = site("decode.first_row", "the first token whose keys and values were computed in this step")
BYTES = site("decode.cache_bytes", "bytes of the cache's tensors", unit="B")
MS = site("decode.milliseconds", "how long this step took", unit="ms")
KEPT = site("decode.work_kept", "multiplications so far when keys and values are kept")
REREAD = site("decode.work_reread", "multiplications so far when every token is computed again")
KEPT_SLOT, NEW_SLOT, REREAD_SLOT = 1, 3, 4  # codes of Slots.states
PROMPT_TOKENS = 160  # of a longer prompt, the beginning is read
POST_SHAPE = {"layers": 32, "heads": 32, "width": 128, "value_bytes": 4, "memory": 80e9}  # as `post` has it


PROMPT = "Marta found a small key in her grandmother's kitchen. She knew at once that it opened"
TOY_PROMPT = "one day in the kitchen . the orange shell is in the barn . where is the orange shell ?"


class Turn(Knobs):
    model = choice()
    prompt = param.String(PROMPT, label="Prompt", doc="What the model reads before it writes.")
    tokens = param.Integer(40, bounds=(4, 96), label="New tokens", doc="How many tokens the model writes.")
    cache = param.Boolean(True, label="Keep keys and values", doc="Off: every token is computed again at every step.")
    temperature = param.Number(0.0, bounds=(0.0, 2.0), step=0.1, label="Temperature", doc="0: the likeliest token.")
    layer = param.Integer(12, bounds=(0, 29), label="Layer", doc="Which layer you look into.")
    head = param.Integer(3, bounds=(0, 8), label="Head", doc="Which of its heads.")


def run(knobs: Turn) -> None:
    model, tokenizer = load(knobs.model)
    # Toyland has none of the usual words: as long as nobody types others, its model gets a prompt of its own.
    prompt_text = TOY_PROMPT if knobs.model == TOY and knobs.prompt == PROMPT else knobs.prompt
    ids = tokenizer.prompt(prompt_text)[:PROMPT_TOKENS]
    read_aloud(tokenizer.pieces(ids))
    shape, prompt = model.shape, len(ids)
    note(prompt_tokens=prompt, new_tokens=knobs.tokens, cached=knobs.cache, total_steps=knobs.tokens)
    note(D=shape.width, H=shape.heads * shape.head_width, value_bytes=next(model.parameters()).element_size())
    note(cache_values=cost.kv_values(shape, tokens=prompt + knobs.tokens - 1))
    cache = Full() if knobs.cache else None
    kept = reread = 0.0
    words = generate(model, ids, steps=knobs.tokens, cache=cache, temperature=knobs.temperature)
    began = time.perf_counter()
    for i, token in enumerate(words):
        held = prompt + i  # tokens read so far: the new one is not among them yet
        rows = 1 if i else prompt
        kept += sum(multiplications(model, rows=rows, keys=held))
        reread += sum(multiplications(model, rows=held, keys=held))
        new = rows if knobs.cache else held
        codes = np.full(held, KEPT_SLOT, np.uint8)
        codes[held - new :] = NEW_SLOT if knobs.cache else REREAD_SLOT
        tap(SLOTS, codes, "slot")
        tap(FIRST, held - new, "")
        tap(BYTES, cache.nbytes if cache else 0, "")
        tap(KEPT, kept, "")
        tap(REREAD, reread, "")
        tap(MS, (time.perf_counter() - began) * 1e3, "")
        read_aloud(tokenizer.pieces([token]))
        if (top := newest("next.top.ids")) is not None:
            name_ids(tokenizer, top[-1])
        began = time.perf_counter()


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    ms = recording.stack(MS)
    kept, reread = recording.stack(KEPT)[-1], recording.stack(REREAD)[-1]
    top = recording.stack("next.top.probability")
    return {
        "prompt_tokens": meta["prompt_tokens"],
        "new_tokens": len(ms),
        "total": meta["prompt_tokens"] + len(ms),
        "saving": float(reread / kept),
        "first_ms": float(ms[0]),
        "token_ms": float(np.median(ms[1:])),
        "tokens_a_second": float(1e3 / np.median(ms[1:])),
        "top": float(top.reshape(-1, top.shape[-1])[-1, 0]),
        "bytes_a_token": meta["cache_values"] / (meta["prompt_tokens"] + len(ms) - 1) * meta["value_bytes"],
        "cache_bytes": float(recording.stack(BYTES)[-1]),
        "half": len(ms) // 2,
        "last": len(ms) - 1,
        "kv_heads": meta["model"]["kv_heads"],
        "heads": meta["model"]["heads"],
    }


def marks(recording: Recording) -> list[Mark]:
    return [Mark(0, "the prompt, all at once")]


def _matmuls(recording: Recording) -> Finding:
    meta = recording.meta
    N, D, H = meta["prompt_tokens"], meta["D"], meta["H"]
    groups = meta["model"]["heads"] // meta["model"]["kv_heads"]
    formula = cost.attention_multiplications(N, D, H)
    counted = int(recording.stack("work.multiplications")[0][:4].sum()) // meta["model"]["layers"]
    shared = 2 * N * D * (H - H // groups)  # keys and values that query heads share are made once
    same = counted == formula - shared
    why = f"Here {groups} query heads share a key head, which saves {shared:,} of them." if shared else ""
    if not same:
        why = f"The formula gives {formula - shared:,}, and {counted:,} were counted."
    filled = f"3·{N}·{D}·{H} + {N}²·{H} + {N}²·{H} + {N}·{H}·{D} = {formula:,}"
    return Finding(f"{counted:,}", "agrees" if same else "differs", why, filled)


def _growth(recording: Recording) -> Finding:
    D, H = recording.meta["D"], recording.meta["H"]
    sizes = [2**k for k in range(12, 17)]
    slopes = [
        cost.growth_exponent(sizes, [cost.generation_multiplications(1, n, D, H, cached=kept) for n in sizes])
        for kept in (False, True)
    ]
    agrees = abs(slopes[0] - 3) < 0.15 and abs(slopes[1] - 2) < 0.15
    filled = f"N from {sizes[0]:,} to {sizes[-1]:,}, D = {D}: N^{slopes[0]:.2f} → N^{slopes[1]:.2f}"
    why = "Short texts grow more slowly: there the projections, linear in N, outweigh the scores."
    return Finding(f"{slopes[0]:.2f} → {slopes[1]:.2f}", "agrees" if agrees else "differs", why, filled)


def _values(recording: Recording) -> Finding:
    meta = recording.meta
    m = meta["model"]
    if not meta["cached"]:
        return Finding("–", "untestable", "The cache is off in this run: there is nothing to weigh.")
    tokens = meta["prompt_tokens"] + len(recording.stack(BYTES)) - 1
    width = meta["H"] // m["heads"]
    counted = int(recording.stack(BYTES)[-1]) // meta["value_bytes"]
    formula = tokens * m["kv_heads"] * m["layers"] * width * 2
    filled = f"1 · {tokens} · {m['kv_heads']} · {m['layers']} · {width} · 2 = {formula:,}"
    why = "" if counted == formula else f"The tensors hold {counted:,} values: room is set aside before it is needed."
    return Finding(f"{counted:,}", "agrees" if counted == formula else "differs", why, filled)


def _post_size(recording: Recording) -> Finding:
    p = POST_SHAPE
    a_token = 2 * p["layers"] * p["heads"] * p["width"] * p["value_bytes"]
    fit = cost.tokens_that_fit(p["memory"], a_token)
    filled = f"2·{p['layers']}·{p['heads']}·{p['width']}·{p['value_bytes']} B = {a_token:,} B; 80 GB / that = {fit:,}"
    why = "The source’s own formula gives half of its bytes, and 19 times its tokens."
    return Finding(f"{a_token / 2**20:.0f} MiB, {fit:,} tokens", "differs", why, filled)


def _speed(recording: Recording) -> Finding:
    f = facts(recording)
    faster = f["first_ms"] / f["prompt_tokens"] < f["token_ms"]
    filled = f"{f['first_ms']:.0f} ms for {f['prompt_tokens']} tokens at once, then {f['token_ms']:.0f} ms a token"
    measured = f"{f['first_ms']:.0f} ms, then {f['tokens_a_second']:.1f} tokens/s"
    why = "" if faster else "The prompt is too short here for reading it at once to pay."
    return Finding(measured, "agrees" if faster else "differs", why, filled)


# fmt: off
CLAIMS = (
    Claim(
        "One layer of attention costs 3NDH + N²H + N²H + NHD multiplications", "post", "3NDH + N²H + N²H + NHD",
        "formula", _matmuls, "multiplications",
    ),
    Claim(
        "Keeping keys and values turns O(N³) into O(N²) over a whole generation", "post",
        "slope of log count over log N", "3 → 2", _growth,
    ),
    Claim(
        "The cache holds batch · tokens · heads · layers · head width · 2 values", "lecture", "B·N·H·L·d·2",
        "formula", _values, "values",
    ),
    Claim(
        "At 32 layers, 32 heads of 128 in fp32 a token costs about 2 MB, and 80 GB hold 4,000", "post", "2·L·H·d·4 B",
        "2 MB, 4,000 tokens", _post_size,
    ),
    Claim(
        "Reading the prompt is one pass; then each token waits for its own", "primer",
        "time to first token; time a token", "two phases", _speed,
    ),
)

BEATS = (
    Beat(
        "A language model has read a prompt. Its answer comes one token at a time: ==the darkest bar|next== is the "
        "likeliest, and it is added to ==the text|text==. Then everything starts again, with one token more.",
        scene="write", step=0, notes="Let it write two or three tokens by hand with the step button.",
    ),
    Beat(
        "To choose a token, each one looks back at those before it. ==A row of the matrix|attention== is one token, "
        "looking: the darker a cell, the more it takes from there. The prompt’s {prompt_tokens} rows came **at once**; "
        "from then on each step adds one.", scene="write", step="half", play=True, focus="attention",
    ),
    Beat(
        "Click any cell of the matrix. It is a [[query]] times a [[key]], a scale and a [[softmax]]: with the numbers "
        "of this very run.", scene="write", focus="attention", do=Do("Open a cell’s arithmetic", cell="attention"),
    ),
    Beat(
        "Now look at what is new. A token’s key and value depend only on the tokens before it, so they never change: "
        "==the dim rows|keys== were computed earlier. Only ==the lit one|values== is new. A model that forgot them "
        "would have to compute every row again.", scene="parts", step="half", focus="keys",
    ),
    Beat(
        "How much does remembering save? Count the multiplications for the whole text.", scene="cost", step="last",
        predict=Predict(
            "Writing {new_tokens} tokens after {prompt_tokens}: how many times fewer multiplications when keys and "
            "values are kept?", (2, 6, 25, 100), "saving", format=".1f", unit="×",
        ),
    ),
    Beat(
        "{saving:.1f} times fewer. ==Without|work== the cache the sum curves upwards, since each step costs as much as "
        "all that came before; with it, it is almost a straight line. Memory is what it costs: ==the strip|cache== "
        "grows by {bytes_a_token:,.0f} bytes with every token, in a straight line too.", scene="cost", step="last",
        focus="work",
    ),
    Beat(
        "Switch **Keep keys and values** off and run it. The words stay the same to the letter; every row is lit, and "
        "each token takes longer than the last.", scene="parts", do=Do("Turn the cache off", knob="cache"),
    ),
    Beat(
        "Break it: write a longer prompt, raise the temperature, change the model. Can you find a case where the "
        "answer with the cache differs from the one without? If you do, we have a bug: tests hold them equal.",
        scene="write", step="last",
    ),
)
# fmt: on

GLOSSARY = {
    "query": "What a token asks of those before it: a vector made from its state by a learned matrix.",
    "key": "What a token offers to those after it. Query times key says how much it is looked at.",
    "softmax": "Turns scores into shares that add up to one: e to each score, divided by the sum.",
}

HERE = {"layer": knob("layer"), "batch": 0}
# fmt: off
ATTENTION = Heatmaps(
    name="attention", title="Who looks at whom", span=7, tensor=of("attention.pattern", **HERE), rows="query",
    columns="key", facet="head", focus=knob("head"), colours="attention", row_labels="tokens", column_labels="tokens",
    cell=attention_cell,
)
# fmt: on


def _part(name: str, title: str, colour: str, **more: Any) -> Heatmaps:
    """Queries, keys or values of the layer: a row a token, lit where this step computed it."""
    rows = "query" if name == "queries" else "key"
    shared: dict[str, Any] = {"columns": "width", "facet": "head", "row_labels": "tokens", "lit": of(FIRST), "span": 4}
    return Heatmaps(name=name, title=title, rows=rows, colours=colour, **shared, **more)


# fmt: off
CACHE = Strip(
    "Keys and values", of(SLOTS), detail="{slots} tokens, in every layer", number=of(BYTES), number_label="bytes",
    number_format=",.0f",
)
SCENES = (
    Scene(
        "write",
        (
            Tokens(name="text", title="The text, as it is written", fold=False), ATTENTION,
            Bars(
                name="next", title="What comes next", span=5, values=of("next.top.probability"),
                labels=of("next.top.ids"), colour="recent",
            ),
        ),
    ),
    Scene(
        "parts",
        (
            _part("queries", "Queries", "query", tensor=of("attention.q", **HERE), focus=knob("head")),
            _part("keys", "Keys, kept", "key", tensor=of("attention.k", **HERE)),
            _part("values", "Values, kept", "value", tensor=of("attention.v", **HERE)),
            Slots(name="slots", title="The cache", strips=(CACHE,)),
        ),
    ),
    Scene(
        "cost",
        (
            Curves(
                name="work", title="Multiplications so far", span=7,
                lines=(
                    Line("computing all again", of(REREAD), colour="alarm"),
                    Line("keeping keys and values", of(KEPT), colour="recent"),
                ),
                x_label="new token", y_label="multiplications", format=".2s",
            ),
            Numbers(
                name="clock", title="Measured in this run", span=5,
                numbers=(
                    Number("This step", of(MS), unit="ms", format=",.0f"),
                    Number("Positions computed", of("work.rows"), colour="recent"),
                    Number("Cache", of(BYTES), unit="bytes"),
                ),
            ),
            Slots(name="cache", title="The cache", strips=(CACHE,)),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    sites = ("attention.q", "attention.k", "attention.v", "attention.pattern")
    return {name: {} for name in (*sites, "next.*", "work.*", "decode.*")}


# fmt: off
LESSON = Lesson(
    slug="decode", title="One token at a time",
    question="Why does a language model reread everything to say one more word?", part="Where the time goes", order=1,
    sources=("post", "lecture", "primer"), knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.mixers.softmax:SoftmaxAttention", "engine.caches.full:Full", "engine.generate:generate"),
    looks=frozenset({"layer", "head"}), bounded_by={"layer": "layers", "head": "heads"}, facts=facts, marks=marks,
    glossary=GLOSSARY, step_word="token", seconds=300,
)
# fmt: on
