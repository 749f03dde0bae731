/**
 * Number formats as rulers on one scale of powers of two: where each begins and ends, how finely it is ruled; and a
 * tensor's values dropped onto them, so that one sees what fits, what is too large and what is rounded away to zero.
 */
import { raised } from "./bits.js";
import { createCursor } from "./cursor.js";
import { make, sized } from "./dom.js";
import { format, short } from "./text.js";

const RULER_ROW = 60;
const RULER_HEAP = 38; // how high the heap of values over a ruler gets
const RULER_NAME = 96;
const RULER_TOLD = 118;
const RULER_FROM = -26; // powers of two that are always on the axis
const RULER_TO = 17;
const RULER_GAP = 2.6; // pixels between two marks that are told apart

export function rulers(host, spec, context) {
  const { store } = context;
  const canvas = make("canvas", { role: "application", tabindex: context.bare ? null : 0 });
  const wrap = make("div", { class: "canvas-wrap" }, canvas);
  host.append(wrap);
  let step = 0;
  let key = "";
  let plan = null;
  let rows = [];

  const read = () =>
    spec.rulers.map((ruler) => ({
      ruler,
      ends: store.newest(ruler.ends, step),
      levels: ruler.levels && store.newest(ruler.levels, step),
      lost: store.newest(ruler.lost, step),
    })).filter((row) => row.ends);

  /** The heap so far: the share of values in each octave; its first is 2^low. */
  const heapOf = () => store.newest(spec.tensor, step) || [];

  const edges = () => {
    const heap = store.of(spec.tensor);
    if (!heap) return [RULER_FROM, RULER_TO];
    const last = heap.numbers(heap.count - 1);
    const held = last.map((share, n) => [share, n + spec.low]).filter(([share]) => share > 0).map(([, octave]) => octave);
    return [Math.max(-44, Math.min(RULER_FROM, ...held)), Math.min(40, Math.max(RULER_TO, ...held.map((octave) => octave + 1)))];
  };

  const lay = () => {
    const width = host.clientWidth;
    const narrow = width < 520;
    const left = context.bare ? 0 : narrow ? 0 : RULER_NAME;
    const right = context.bare || narrow ? 0 : RULER_TOLD;
    const [from, to] = edges();
    const tall = RULER_ROW + (narrow ? 18 : 0);
    return { width, narrow, left, right, from, to, tall, height: rows.length * tall + 26, x: (power) => left + ((power - from) / (to - from)) * (width - left - right) };
  };

  const draw = (now) => {
    step = now;
    rows = read();
    const heap = heapOf();
    if (!rows.length || !host.clientWidth) return false;
    const wanted = [step, host.clientWidth, context.theme, store.of(spec.tensor)?.version, rows.length].join(" ");
    if (wanted === key) return true;
    key = wanted;
    plan = lay();
    const pen = sized(canvas, plan.width, plan.height);
    pen.clearRect(0, 0, plan.width, plan.height);
    const most = Math.max(1e-12, ...heap);
    rows.forEach((row, n) => paintRow(pen, row, n * plan.tall + (plan.narrow ? 18 : 0), heap, most));
    axis(pen);
    canvas.setAttribute("aria-label", describe());
    cursor.refresh();
    return true;
  };

  /** Two to what power a value is. */
  const power = (value) => Math.log2(Math.abs(value));

  const paintRow = (pen, { ruler, ends, levels, lost }, y, heap, most) => {
    const { role } = context.colours;
    const [least, normal, largest, mantissa] = ends;
    const base = y + RULER_HEAP + 4;
    const [a, b] = [Math.max(plan.x(plan.from), plan.x(power(least))), Math.min(plan.x(plan.to), plan.x(power(largest)))];
    heap.forEach((share, n) => {
      const octave = n + spec.low;
      if (share <= 0 || octave < plan.from || octave >= plan.to) return;
      const height = Math.max(1, (share / most) * RULER_HEAP);
      const [x0, x1] = [plan.x(octave), plan.x(octave + 1)];
      const inside = octave + 1 > power(least) - 1 && octave < power(largest);
      pen.fillStyle = role(inside ? "recent" : "alarm");
      pen.globalAlpha = inside ? 0.55 : 0.9;
      pen.fillRect(x0 + 0.5, base - height, x1 - x0 - 1, height);
    });
    pen.globalAlpha = 1;
    pen.fillStyle = role("sunk");
    pen.fillRect(plan.x(plan.from), base, plan.x(plan.to) - plan.x(plan.from), 11);
    // Below the smallest normal number steps stay as wide as they are there: each octave down has half as many.
    pen.fillStyle = role(ruler.colour);
    pen.globalAlpha = 0.24;
    pen.fillRect(a, base, Math.max(0, b - a), 11);
    pen.globalAlpha = 1;
    if (levels) levels.forEach((level) => level > 0 && mark(pen, plan.x(power(level)), base));
    else ruled(pen, base, { a, b, normal, mantissa });
    pen.font = `600 13px ${context.fonts.text}`;
    pen.textBaseline = "middle";
    pen.textAlign = "left";
    pen.fillStyle = role("ink");
    if (context.bare) return;
    pen.fillText(ruler.label, 0, plan.narrow ? y - 8 : base - 2);
    const told = toldOf(lost);
    pen.font = `12px ${context.fonts.text}`;
    pen.textAlign = plan.narrow ? "right" : "left";
    pen.fillStyle = lost && lost[0] + lost[1] > 0 ? context.colours.ink("alarm") : role("muted");
    told.forEach((text, n) => pen.fillText(text, plan.narrow ? plan.width - n * 130 : plan.width - RULER_TOLD + 10, plan.narrow ? y - 8 : base - 10 + n * 16));
    const beyond = power(largest) > plan.to;
    if (beyond) arrow(pen, plan.x(plan.to), base + 5.5, 1, role(ruler.colour));
    if (power(least) < plan.from) arrow(pen, plan.x(plan.from), base + 5.5, -1, role(ruler.colour));
  };

  const toldOf = (lost) => (lost ? [`to zero ${percent(lost[0])}`, `too large ${percent(lost[1])}`] : []);

  const percent = (share) => (share === 0 ? "0" : share < 0.0001 ? "< 0.01%" : format(share, share < 0.1 ? ".2%" : ".0%"));

  const mark = (pen, x, base) => {
    if (x < plan.x(plan.from) || x > plan.x(plan.to)) return;
    pen.fillRect(x - 0.6, base, 1.2, 11);
  };

  /** The marks of a float's octaves, where they can be told apart; else the band is full. */
  const ruled = (pen, base, { a, b, normal, mantissa }) => {
    const octave = plan.x(plan.from + 1) - plan.x(plan.from);
    for (let k = Math.floor(plan.from); k < plan.to; k += 1) {
      const steps = 2 ** Math.max(0, Math.min(mantissa, mantissa + (k - Math.log2(normal))));
      const [x0, x1] = [Math.max(a, plan.x(k)), Math.min(b, plan.x(k + 1))];
      if (x1 <= x0) continue;
      if (octave / steps < RULER_GAP) {
        pen.globalAlpha = Math.min(1, 0.35 + mantissa / 26);
        pen.fillRect(x0, base, x1 - x0, 11);
        pen.globalAlpha = 1;
      } else {
        for (let s = 0; s < steps; s += 1) {
          const at = plan.x(k + Math.log2(1 + s / steps));
          if (at >= x0 - 0.5 && at <= x1 + 0.5) mark(pen, at, base);
        }
      }
    }
  };

  const arrow = (pen, x, y, way, colour) => {
    pen.fillStyle = colour;
    pen.beginPath();
    pen.moveTo(x + way * 8, y);
    pen.lineTo(x, y - 6);
    pen.lineTo(x, y + 6);
    pen.fill();
  };

  const axis = (pen) => {
    const y = plan.height - 18;
    pen.font = `11px ${context.fonts.mono}`;
    pen.textAlign = "center";
    pen.textBaseline = "top";
    pen.fillStyle = context.colours.role("muted");
    const every = plan.narrow ? 12 : 4;
    for (let k = Math.ceil(plan.from / every) * every; k <= plan.to; k += every) {
      const x = plan.x(k);
      pen.fillRect(x - 0.5, y - 5, 1, 4);
      if (!context.bare && x > plan.left + 8 && x < plan.width - plan.right - 8) pen.fillText(k === 0 ? "1" : Math.abs(k) < 12 && k > 0 ? String(2 ** k) : `2${raised(k)}`, x, y);
    }
  };

  const describe = () => `${spec.title}: ${rows.map(({ ruler, ends, lost }) => `${ruler.label} from ${short(ends[0])} to ${short(ends[2])}, ${toldOf(lost).join(", ")}`).join("; ")}.`;

  const grid = {
    find(x, y) {
      if (!plan) return null;
      const row = Math.floor(y / plan.tall);
      const octave = Math.floor(plan.from + ((x - plan.left) / (plan.width - plan.left - plan.right)) * (plan.to - plan.from));
      return rows[row] && octave >= plan.from && octave < plan.to ? { row, octave } : null;
    },
    box: (cell) => (plan && rows[cell.row] ? { x: plan.x(cell.octave), y: cell.row * plan.tall + (plan.narrow ? 18 : 0), width: plan.x(1) - plan.x(0), height: RULER_HEAP + 16 } : null),
    move(cell, down, right) {
      if (!plan) return null;
      const next = cell ? { row: cell.row + down, octave: cell.octave + right } : { row: 0, octave: -4 };
      return rows[next.row] && next.octave >= plan.from && next.octave < plan.to ? next : cell;
    },
    lines({ row, octave }) {
      const { ruler, ends, levels } = rows[row];
      const [low, high] = [2 ** octave, 2 ** (octave + 1)];
      const count = levels ? levels.filter((level) => level >= low && level < high).length : countOf(ends, octave);
      const share = heapOf()[octave - spec.low] || 0;
      return [`${ruler.label}: ${format(count, ",.0f")} ${count === 1 ? "value" : "values"}`, `from ${short(low)} to ${short(high)}`, `${format(share, ".2%")} of the numbers dropped lie there`];
    },
    open() {},
  };

  const cursor = createCursor(wrap, canvas, context.tip, grid, context.announce);
  return {
    draw,
    resize() {
      key = "";
      draw(step);
    },
    dispose: () => wrap.remove(),
    table: () => ({
      columns: ["format", "smallest", "largest", "rounded to zero", "too large"],
      rows: rows.map(({ ruler, ends, lost }) => [ruler.label, short(ends[0]), short(ends[2]), lost ? percent(lost[0]) : "", lost ? percent(lost[1]) : ""]),
    }),
  };
}

/** How many values a float has between 2^octave and twice that. */
function countOf([least, normal, largest, mantissa], octave) {
  const [first, start, last] = [least, normal, largest].map((value) => Math.floor(Math.log2(value)));
  if (octave < first || octave > last) return 0;
  const full = 2 ** (octave < start ? Math.max(0, mantissa - (start - octave)) : mantissa);
  return octave === last ? Math.round((largest / 2 ** octave - 1) * full) + 1 : full;
}
