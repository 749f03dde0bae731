"""The views a scene is made of: declarations only. `app/stage/<kind>.js` draws each of them.

A view names tensors of the recording with `of(...)` and knobs with `knob(...)`:

    Heatmaps(of("attention.pattern", layer=knob("layer")), rows="query", columns="key", facet="head")

Every view takes `name` (beats point at it), `title`, `note`, `span` (columns of twelve on a wide screen) and
`origin` ("toy", "real", "converted", "simulated", "reported", "formula"; by default what the recording's model says).
A tensor whose site grows is drawn row by row up to the player's step; of any other the newest frame is drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class knob:
    """The value of a knob, read where the picture is drawn, so that turning a look knob redraws at once."""

    name: str


@dataclass(frozen=True)
class Of:
    """A tensor of the recording: a site's name, the tap's index, and positions picked along axes."""

    name: str
    where: tuple[tuple[str, Any], ...]


def of(name: str, **where: Any) -> Of:
    """Name a recorded tensor. `where` gives tap indices (layer=3) or positions along axes (batch=0); either
    may be a `knob(...)`."""
    return Of(name, tuple(sorted(where.items())))


@dataclass(frozen=True, kw_only=True)
class View:
    """What all views share."""

    kind: ClassVar[str]
    name: str = ""
    title: str = ""
    note: str = ""
    span: int = 12
    origin: str = ""

    def tensors(self) -> Iterator[Of]:
        """Every tensor that the view shows."""
        yield from _find(self, Of)

    def knobs(self) -> set[str]:
        """Every knob that the view reads."""
        names = {k.name for k in _find(self, knob)}
        return names | {k.name for t in self.tensors() for _, k in t.where if isinstance(k, knob)}


Cell = Callable[[Any, Any, Mapping[str, int]], "Arithmetic"]


@dataclass(frozen=True)
class Heatmaps(View):
    """A matrix, or one a `facet`, in colour: attention, keys, scores. Hover reads a value; a click opens `cell`."""

    kind: ClassVar[str] = "heatmaps"
    tensor: Of
    rows: str  # axis drawn downwards
    columns: str  # axis drawn to the right
    facet: str = ""  # axis drawn as small multiples
    focus: knob | int | None = None  # the facet drawn large
    colours: str = "sequential"  # sequential, diverging, or a role of the palette: attention, query, key, value, sink
    row_labels: str | tuple[str, ...] = ""  # "tokens" takes them from the text
    column_labels: str | tuple[str, ...] = ""
    states: tuple[str, ...] = ()  # the tensor holds codes, and these are their names; the legend and hover tell them
    state_colours: tuple[str, ...] = ()  # a role for each state; "sunk" for what is not there
    lit: Of | None = None  # int: the first row computed at each step; rows above it are dimmed as reused
    veil: Of | None = None  # the same rows and columns, without facets: cells where it is 0 are drawn grey, left out
    cell: Cell | None = None  # opens a cell's arithmetic
    gaps: bool = False  # draw cells apart (few, large cells) instead of edge to edge
    power: float = 1.0  # exponent of the colour scale: 0.5 shows small values


@dataclass(frozen=True)
class Strip:
    """One row of Slots: a cache, its slots, and a number beside it."""

    label: str
    codes: Of  # uint8 [slot]: what each slot holds, as a number into the view's `states`
    detail: str = ""  # may use {kept}, {evicted} and {slots}, counted from the codes at the player's step
    number: Of | None = None  # the value at the player's step
    number_label: str = ""
    number_format: str = ".1f"
    colour: str = "ink"
    aside: str = ""


@dataclass(frozen=True)
class Slots(View):
    """Cache strips, one a strategy, in lockstep: which slots are held, which are gone."""

    kind: ClassVar[str] = "slots"
    strips: tuple[Strip, ...]
    states: tuple[str, ...] = ("empty", "kept", "sink", "recent", "recomputed", "heavy", "evicted")
    labels: str = "tokens"


@dataclass(frozen=True)
class Tokens(View):
    """The text as it is read: chips coloured by what became of each token (`codes`) or by a value."""

    kind: ClassVar[str] = "tokens"
    codes: Of | None = None  # uint8 [token], into `states`
    states: tuple[str, ...] = Slots.states
    value: Of | None = None  # a scalar a token, growing
    colours: str = "sequential"
    value_label: str = ""
    fold: bool = True  # leave out evicted stretches behind an ellipsis


@dataclass(frozen=True)
class Number:
    """One figure: the value at the player's step."""

    label: str
    tensor: Of
    unit: str = ""
    format: str = ",.0f"
    colour: str = "ink"
    detail: str = ""


@dataclass(frozen=True)
class Numbers(View):
    """Figures side by side."""

    kind: ClassVar[str] = "numbers"
    numbers: tuple[Number, ...]


@dataclass(frozen=True)
class Line:
    """One line of Curves: a scalar a step, or a whole curve a step."""

    label: str
    tensor: Of
    colour: str = "ink"
    dashed: bool = False
    x: Of | None = None  # where each point stands; its step or position by default
    band: tuple[Of, ...] = ()  # the lowest and the highest of what it is the mean of: shaded


@dataclass(frozen=True)
class Curves(View):
    """Lines with the player's cursor: what is past is drawn firmly, what is to come faintly."""

    kind: ClassVar[str] = "curves"
    lines: tuple[Line, ...]
    x_label: str = ""
    y_label: str = ""
    log: bool = False
    log_x: bool = False
    across: str = ""  # an axis: draw the newest frame along it, instead of a scalar over the steps
    low: float | None = None
    high: float | None = None
    start: int = 0  # the first step drawn
    format: str = ".1f"
    height: int = 150


@dataclass(frozen=True)
class Bars(View):
    """A labelled distribution at the player's step: the next token, experts' load."""

    kind: ClassVar[str] = "bars"
    values: Of
    labels: Of | tuple[str, ...] = ()  # token ids (read as text) or fixed words
    colour: str = "recent"
    format: str = ".0%"
    high: float | None = 1.0


@dataclass(frozen=True)
class Facing(View):
    """Two bars a row on one scale, back to back, the longer one firm: bytes against FLOPs, what limits each."""

    kind: ClassVar[str] = "facing"
    left: Of  # [row]
    right: Of  # [row]
    labels: Of | tuple[str, ...]  # token ids (read as text) or fixed words
    left_label: str
    right_label: str
    unit: str = ""
    left_colour: str = "key"
    right_colour: str = "value"
    format: str = ".3g"


@dataclass(frozen=True)
class Points:
    """Points of a Plane, one for each position of `x` and `y` (or one, when they are single numbers)."""

    label: str
    x: Of
    y: Of
    colour: str = "ink"
    names: tuple[str, ...] = ()
    trail: bool = False  # points of earlier steps stay, faintly: a search that moves
    joined: bool = False  # a line through them, in order


@dataclass(frozen=True)
class Plane(View):
    """Points on two axes, which the learner may enlarge and move: rooflines, Pareto fronts. `lines` give whole curves
    (their `x` and `tensor` are rows of one length). A click on a point opens `cell`: the last axis of `tensor` is the
    point's number, an axis before it the number of its group, a growing axis its step."""

    kind: ClassVar[str] = "plane"
    points: tuple[Points, ...]
    lines: tuple[Line, ...] = ()
    x_label: str = ""
    y_label: str = ""
    log: bool = False
    log_x: bool = False
    x_format: str = ".3s"
    format: str = ".3s"
    height: int = 300
    tensor: Of | None = None
    cell: Cell | None = None


@dataclass(frozen=True)
class Routes(View):
    """Who is sent to whom: query heads to key heads, tokens to experts. Lines between two rows of nodes, as thick as
    their weight. Where the tensor grows, its newest rows up to the player's step stand on the left."""

    kind: ClassVar[str] = "routes"
    tensor: Of  # weights [from, to], 0 for no line; or whole numbers [from], the node that each goes to
    left: str  # what stands on the left, in one word: "query head"
    right: str
    left_labels: tuple[str, ...] | str = ()  # "tokens" takes them from the text; nothing: numbers
    right_labels: tuple[str, ...] = ()
    left_colour: str = "query"
    right_colour: str = "key"
    loads: Of | None = None  # a bar beside each node on the right [to]
    loads_label: str = ""
    loads_format: str = ".0%"
    count: int | Of | None = None  # nodes on the right, where the tensor does not say
    newest: int = 16  # rows shown of a tensor that grows
    cell: Cell | None = None


@dataclass(frozen=True)
class Stack(View):
    """Layer by layer, the first at the bottom: what each is, whose cache it reads, what it stores, what works now."""

    kind: ClassVar[str] = "stack"
    codes: Of  # whole numbers [layer], into `kinds`
    kinds: tuple[str, ...]
    colours: tuple[str, ...] = ()  # a role for each kind
    reads: Of | None = None  # whole numbers [layer]: the layer whose cache it reads; -1 for none
    values: Of | None = None  # numbers [layer]: what each stores
    values_label: str = ""
    values_format: str = ",.0f"
    lit: Of | None = None  # 0 to 1 [layer]: how much of it works (or is trained)
    lit_label: str = ""


@dataclass(frozen=True)
class Blocks(View):
    """Page tables over a pool: whose entry points to which block, what each block's slots hold, who waits, which blocks
    are free. What changed since the step before is told in words and set off."""

    kind: ClassVar[str] = "blocks"
    tensor: Of  # whole numbers [sequence, entry]: the block behind each entry; below 0 for none
    states: Of  # [sequence]: 0 not here yet, 1 waiting, 2 running, 3 sent away, 4 done
    families: Of  # [sequence]: those of one number are forks of one text, and share a letter
    slots: Of  # [block, slot]: 0 empty, 1 held, 2 dropped, 3 left over from a text that is gone
    tokens: Of  # [block, slot]: the token's id, read as text
    refs: Of  # [block]: how many tables point to it
    free: Of  # [place]: blocks, the next to be given away first
    cell: Cell | None = None


@dataclass(frozen=True)
class Stretches(View):
    """One memory, slot by slot, twice: each text in a single stretch, whose slots are used, still to be used, or never
    used; and, where `tables` is given, the same texts in blocks."""

    kind: ClassVar[str] = "stretches"
    tensor: Of  # [request, part]: start, length, tokens, tokens at its end, owner
    families: Of  # as in Blocks
    states: Of
    slots: Of  # how many there are
    tables: Of | None = None  # as `tensor` of Blocks
    codes: Of | None = None  # as `slots` of Blocks


@dataclass(frozen=True)
class Holding:
    """One strip of a Footprint: what a design keeps, and a figure beside it."""

    label: str
    parts: Of  # numbers [layer]: what each layer keeps
    detail: str = ""
    figure: Of | None = None  # one number
    figure_label: str = ""
    figure_format: str = ".2f"
    colour: str = "key"


@dataclass(frozen=True)
class Footprint(View):
    """What designs keep, layer by layer, as strips on one scale: the longest that the run has fills the width. A strip
    that grows or shrinks does so before the eyes."""

    kind: ClassVar[str] = "footprint"
    holdings: tuple[Holding, ...]
    unit: str = "bytes a token"
    grain: Of | None = None  # one number: what a head keeps in a layer; strips are ruled at it


@dataclass(frozen=True)
class Tiles(View):
    """A matrix that is swept tile by tile, driven by the engine's tiles alone: done, now, skipped, still to come. With
    `mirror`, the whole matrix beside it keeps what the sweep forgets; below, counted bytes of both ways."""

    kind: ClassVar[str] = "tiles"
    tensor: Of  # [query, key]: the matrix that standard attention keeps; `cell` opens one of its cells
    tile: Of  # [edge]: first query, the one after the last, first key, the one after the last
    scores: Of  # [row, column]: what the tile computed; nothing at the step of a skipped one
    largest: Of  # [query]: the largest score met so far, and `total`, the sum of exp(score - largest)
    total: Of
    held: Of  # bytes in SRAM now
    causal: Of  # 1 where a query may not look at later keys
    room: Of | None = None  # bytes that it has
    moved: Of | None = None  # bytes between the memories so far, and what the standard way moved for as much
    whole_moved: Of | None = None
    peak: Of | None = None  # bytes in HBM at most
    whole_peak: Of | None = None
    width: Of | None = None  # [width]: as long as a query is wide
    row: knob | None = None  # outlined, and chosen by a click
    mirror: bool = True
    cell: Cell | None = None


@dataclass(frozen=True)
class Ring(View):
    """Devices in a circle, each with its block; blocks on their way between them; and the matrix that they finish."""

    kind: ClassVar[str] = "ring"
    tensor: Of  # [query, key] by chunks: the device that finished it, 100 more while it works, -1 not yet, -2 masked
    state: Of  # [rank]: 0 starts, 1 waits, 2 computes, 3 is done
    block: Of  # [rank]: whose block it works with
    coming: Of  # [rank]: whose block is on its way to it, -1 for none
    share: Of  # [rank]: how much of the way that one has come
    chunks: Of  # [chunk, field]: first token, the one after the last, the device that keeps it
    ready: Of  # how many have started
    simulated: Of | None = None  # 1: the link is simulated; 2: the clock too
    cell: Cell | None = None


@dataclass(frozen=True)
class Timeline(View):
    """Lanes with intervals of time and a moving now: what works, what is on its way, and what of that is hidden."""

    kind: ClassVar[str] = "timeline"
    tensor: Of  # whole numbers [span, field]: lane, kind, item, begin and end in microseconds
    now: Of  # microseconds
    kinds: tuple[str, ...]  # the first is work, and hides the others, which are drawn below it
    lanes: str = "lane"  # a lane in one word
    items: str = "item"  # what an interval is about, in one word; each has its hue
    names: tuple[str, ...] = ()  # of the lanes, where numbers won't do
    end: Of | None = None  # microseconds: where the axis ends, so that two timelines can share a scale
    simulated: Of | None = None  # 1: the link is simulated; 2: the clock too


@dataclass(frozen=True)
class Grid(View):
    """A small matrix on its way to fewer bits: its cells, their codes, what the codes give back and the error, side by
    side at the same places; and the number line, where each value falls onto the level that stands for it. Levels are
    given as such, or follow from scale, zero point and the first and last code of an even grid."""

    kind: ClassVar[str] = "grid"
    tensor: Of  # [row, column]: the values; `cell` opens one of them
    codes: Of | None = None  # whole numbers [row, column]
    back: Of | None = None  # [row, column]
    error: Of | None = None  # [row, column]
    levels: Of | None = None  # [block, level], rising
    ends: Of | None = None  # [2]: the first and the last code
    scale: Of | None = None  # [block]
    zero: Of | None = None  # [block]
    block: Of | None = None  # whole numbers [row, column]: the block of each cell, a row of `levels` or `scale`
    seen: Of | None = None  # how many values are through, row by row; all of them without it
    edit: knob | None = None  # the `Matrix` knob whose cells these are: a click brings the caret there
    editable: Of | None = None  # not 0 where the matrix shown is that knob's
    pick: knob | None = None  # a click turns this knob to the cell's number, as text
    labels: tuple[str, ...] = ("values", "codes", "given back", "size of the error")
    block_word: str = "block"
    line: bool = True  # the number line below
    cell: Cell | None = None


@dataclass(frozen=True)
class BitRow:
    """One format of Bits: how it stores the number."""

    label: str
    form: str  # the format's name in the engine
    bits: Of  # 0 or 1 [bit], the most significant first
    value: Of  # one number: what they stand for
    off: Of  # how far that is from the number: 0 if it is exact, not finite if it does not fit
    fields: tuple[tuple[str, int], ...]  # (sign, exponent, mantissa, magnitude or place; how many bits)
    detail: str = ""
    bias: int = 0
    infinite: bool = True  # the highest exponent holds infinities, and not numbers


@dataclass(frozen=True)
class Bits(View):
    """A number as formats store it, bit by bit, with the sum that the bits stand for. A click flips a bit: `turn`, a
    text knob, then holds the format's name and the row of bits."""

    kind: ClassVar[str] = "bits"
    rows: tuple[BitRow, ...]
    turn: knob | None = None


@dataclass(frozen=True)
class Ruler:
    """One format of Rulers. Positive levels, where there are few; else a float's ends say where its marks are."""

    label: str
    ends: Of  # [4]: smallest above 0, smallest of full precision, largest, bits of the mantissa
    lost: Of  # [2]: the share of the values that became 0, and of those too large
    levels: Of | None = None  # [level], rising
    colour: str = "query"


@dataclass(frozen=True)
class Rulers(View):
    """Number formats as rulers on a scale of powers of two, and a tensor's values in heaps upon them."""

    kind: ClassVar[str] = "rulers"
    tensor: Of  # [octave]: the share of the values whose size lies from 2^octave to twice that
    rulers: tuple[Ruler, ...]
    low: int = -64  # the first octave


@dataclass(frozen=True)
class Saying:
    """One row of Sayings: a model, its words, and figures beside them."""

    label: str
    ids: Of  # token ids, one after the other: one a step; or all that it says now [token]
    figures: tuple[Number, ...] = ()
    detail: str = ""
    colour: str = "ink"


@dataclass(frozen=True)
class Sayings(View):
    """What several models say, one below the other, word by word. The first is the measure: where another says
    something else, that word is set off; with `marked`, instead, the words that are looked for."""

    kind: ClassVar[str] = "sayings"
    sayings: tuple[Saying, ...]
    prompt: Of | None = None  # token ids [token] that all of them go on from
    marked: Of | None = None  # token ids [any]
    abreast: bool = False  # side by side, where there is room


@dataclass(frozen=True)
class Tower:
    """One model of Towers: what of it is trained."""

    label: str
    counts: Of  # [place, part, kind]: parameters trained and frozen, the places from the bottom up
    trained: Of  # one number: all of them
    share: Of  # one number: of the base model's
    moved: Of | None = None  # 0 to 1 [place, part]: how far what is trained has gone
    colour: str = "ink"
    detail: str = ""


@dataclass(frozen=True)
class Towers(View):
    """One model several times over, side by side, from its first layer up: in each what is trained is lit. Every box
    is as wide as the root of the parameters in it."""

    kind: ClassVar[str] = "towers"
    towers: tuple[Tower, ...]
    parts: tuple[str, ...]  # of a layer, in the order of its work
    first: str = "embedding"  # what stands below the layers, and its parts
    first_parts: tuple[str, ...] = ()
    last: str = "last norm"
    share_label: str = "of all"
    key: str = ""  # a sentence beside the legend


@dataclass(frozen=True)
class Sheet(View):
    """A small table: words as a source gives them, and figures of this run, which move with the player. `kinds` says of
    each column what it is (reported, formula, toy, ...)."""

    kind: ClassVar[str] = "sheet"
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Number, ...], ...]
    kinds: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Tree(View):
    """Guesses that hang on a text as a tree, a column for each place: grown, checked, pruned. Marks tell by shape and
    colour what became of each; the position ids stand below, and who sees whom in the one pass beside it."""

    kind: ClassVar[str] = "tree"
    tensor: Of  # [node]: token ids, read as text; node 0 is the last word of the text
    parents: Of  # whole numbers [node]: the node that each comes after; -1 for node 0
    states: Of  # [node]: 0 still to come, 1 text, 2 guessed, 3 accepted, 4 rejected, 5 never looked at, 6 the target's
    # word instead of a rejected one, 7 the target's word after them all
    positions: Of  # whole numbers [node]: the place in the text
    p: Of | None = None  # [node]: the target's probability of each guess, and the drafter's
    q: Of | None = None
    mask: Of | None = None  # [row, key]: 1 where a node of the check sees another
    cell: Cell | None = None


@dataclass(frozen=True)
class Entry:
    """One row of a Ledger. `detail` may name knobs in braces, which are filled in as the run had them."""

    label: str
    detail: str = ""


@dataclass(frozen=True)
class Column:
    """One column of a Ledger. `origin` where it is not measured; `more`: the longer the bar, the better."""

    label: str
    format: str = ".3s"
    unit: str = ""
    more: bool = False
    origin: str = ""


@dataclass(frozen=True)
class Ledger(View):
    """What each step of a stack brought: every row stands on those above it, every figure has a bar against the first
    row's. The figures of the column `budgeted` may rise by `allowed` percent: beside them stands how much of that each
    row has eaten. The last row says how many times better the last step is than the first row."""

    kind: ClassVar[str] = "ledger"
    tensor: Of  # [row, column], not a number where it was not measured (yet)
    used: Of  # [row]: not 0 where the step belongs to this stack
    entries: tuple[Entry, ...]
    columns: tuple[Column, ...]
    budgeted: int
    allowed: knob | float = 10.0
    cell: Cell | None = None  # opens a figure: its row and its column


@dataclass(frozen=True)
class Tries(View):
    """All runs of a lesson in this browser as points of a plane, lower left is better, and the front of those that none
    beats in both. The browser keeps each with its knobs: a click turns them to it, a link opens it elsewhere. Tries of
    other models, or with other values of the knobs `apart`, are kept but not compared."""

    kind: ClassVar[str] = "tries"
    x: Of  # [row]: the way of this run, from the first to the last; not a number where nothing stands
    y: Of  # [row]
    done: Of  # one number, there once the run's try is whole
    x_label: str
    y_label: str
    x_format: str = ".3s"
    format: str = ".2f"
    words: str = ""  # of a try, knobs in braces
    figures: tuple[Number, ...] = ()  # more that is kept of a try
    apart: tuple[str, ...] = ()
    allowed: knob | float | None = None  # percent by which y may rise
    height: int = 290


@dataclass(frozen=True)
class Field:
    """One entry of a Calculator."""

    name: str
    label: str
    value: float
    low: float
    high: float
    unit: str = ""
    whole: bool = True


@dataclass(frozen=True)
class Calculator(View):
    """Numbers that the learner types, and what the engine's formulas make of them. `compute` raises ValueError with a
    sentence that begins with a field's label for what makes no sense."""

    kind: ClassVar[str] = "calculator"
    fields: tuple[Field, ...]
    presets: tuple[tuple[str, Mapping[str, float]], ...]
    compute: Callable[[Mapping[str, float]], Arithmetic]
    origin: str = field(default="formula", kw_only=True)


@dataclass(frozen=True)
class Arithmetic:
    """A cell's sum, one click deep: each line is an expression in symbols and its value in this run.

    `vectors` are named rows of numbers (q, k, their product) that the panel draws as small bars.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    note: str = ""
    vectors: tuple[tuple[str, tuple[float, ...]], ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)


def _find(value: Any, kind: type) -> Iterator[Any]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _find(item, kind)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from _find(getattr(value, f.name), kind)
