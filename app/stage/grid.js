/**
 * A small matrix on its way to fewer bits: the values, the codes, what the codes give back, and the error, side by side at
 * the same cells; and under them the number line, where every value falls onto the level that stands for it.
 */
import { css, wantsDarkInk } from "./colours.js";
import { createCursor } from "./cursor.js";
import { make, sized } from "./dom.js";
import { fall, lineHeight, numberLine } from "./fall.js";
import { calm } from "./player.js";
import { format, short } from "./text.js";

const PANE_TALLEST = 320; // pixels that a pane is high at most
const PANE_LEGIBLE = 34; // a cell narrower than this has no number in it
const PANE_HEAD = 20;
const PANE_GAP = 22;
const PANE_SETTLE = 260; // milliseconds of a fall

export function matrixAndLine(host, spec, context) {
  const { store } = context;
  const canvas = make("canvas", { role: "application", tabindex: context.bare ? null : 0 });
  const wrap = make("div", { class: "canvas-wrap" }, canvas);
  host.append(wrap);
  let step = 0;
  let seen = null; // what stands at the step
  let plan = null;
  let hovered = null;
  let key = "";
  let before = null; // the levels a step ago: they glide
  let began = 0;
  let frame = 0;

  const scalar = (tensor) => (tensor ? (store.newest(tensor, step) || [null])[0] : null);

  /** Everything of this step: {rows, columns, panes, blocks, levels, count}. */
  const read = () => {
    const values = store.frame(spec.tensor, step);
    if (!values) return null;
    const codes = spec.codes && store.frame(spec.codes, step);
    const back = spec.back && store.frame(spec.back, step);
    const error = spec.error && store.frame(spec.error, step);
    const block = spec.block && store.frame(spec.block, step);
    const scales = spec.scale ? store.newest(spec.scale, step) : null;
    const zeros = spec.zero ? store.newest(spec.zero, step) : null;
    const total = values.length * values[0].length;
    const through = scalar(spec.seen);
    return {
      values, codes, back, error, scales, zeros, total,
      rows: values.length,
      columns: values[0].length,
      block: (i, j) => (block ? block[i]?.[j] ?? 0 : 0),
      levels: levelsOf(scales, zeros),
      count: through === null ? total : Math.min(total, through),
      bound: Math.max(1e-30, ...values.flat().map(Math.abs)),
    };
  };

  /** The levels of each block: as recorded, or every line of an even grid from its scale and zero point. */
  const levelsOf = (scales, zeros) => {
    if (spec.levels && store.of(spec.levels)) return store.frame(spec.levels, step);
    const ends = spec.ends ? store.newest(spec.ends, step) : null;
    if (!scales || !ends) return null;
    const codes = Array.from({ length: ends[1] - ends[0] + 1 }, (_, n) => ends[0] + n);
    return scales.map((scale, b) => codes.map((code) => scale * (code - (zeros ? zeros[b] : 0))));
  };

  const panes = () => [
    { name: "values", rows: seen.values, colours: "diverging", range: [-seen.bound, seen.bound], all: true },
    seen.codes && { name: "codes", rows: seen.codes, colours: "recomputed", range: codeRange(), whole: true },
    seen.back && { name: "back", rows: seen.back, colours: "diverging", range: [-seen.bound, seen.bound] },
    seen.error && { name: "error", rows: seen.error, colours: "alarm", range: [0, largestSize(seen.error)], size: true },
  ].filter(Boolean).map((pane, n) => ({ ...pane, label: spec.labels[n] || pane.name }));

  const codeRange = () => {
    const ends = spec.ends ? store.newest(spec.ends, step) : null;
    if (ends) return [ends[0], ends[1]];
    return seen.levels ? [0, seen.levels[0].length - 1] : [Math.min(...seen.codes.flat()), Math.max(...seen.codes.flat())];
  };

  const lay = () => {
    const width = host.clientWidth;
    const list = panes();
    const fitting = (across) => (width - (across - 1) * PANE_GAP) / across / seen.columns;
    const wanted = context.bare ? list.length : [4, 3, 2, 1].find((n) => n <= list.length && fitting(n) >= (n > 2 ? Math.min(PANE_LEGIBLE + 4, 220 / seen.columns) : n > 1 ? Math.min(PANE_LEGIBLE, 130 / seen.columns) : 0)) || 1;
    const across = list.length === 4 && wanted === 3 ? 2 : wanted;
    const cw = Math.min(74, fitting(across));
    const tallest = context.bare ? (context.height || 170) - 8 : PANE_TALLEST;
    const ch = Math.min(tallest / seen.rows, cw < PANE_LEGIBLE ? cw : Math.max(24, Math.min(cw * 0.68, 40)));
    const head = context.bare ? 2 : PANE_HEAD;
    const each = width / across;
    const boxes = list.map((pane, n) => ({ ...pane, x: (n % across) * each, y: Math.floor(n / across) * (head + ch * seen.rows + 14) + head }));
    const below = Math.ceil(list.length / across) * (head + ch * seen.rows + 14);
    const blocks = seen.levels && spec.line && !context.bare ? shownBlocks() : [];
    const tall = lineHeight(blocks.length);
    const lines = blocks.map((b, n) => ({ block: b, x: 6, y: below + 8 + n * (tall + 10), width: width - 12, height: tall }));
    return { width, height: below + (lines.length ? 8 + lines.length * (tall + 10) : 0), boxes, cw, ch, lines };
  };

  /** Up to four blocks have a number line each; of more, the one that is pointed at or at work. */
  const shownBlocks = () => {
    if (seen.levels.length <= 4) return seen.levels.map((_, b) => b);
    const at = hovered || place(Math.max(0, Math.min(seen.count, seen.total) - 1));
    return [seen.block(at.i, at.j)];
  };

  const place = (n) => ({ i: Math.floor(n / seen.columns), j: n % seen.columns });
  const order = (cell) => cell.i * seen.columns + cell.j;

  const draw = (now) => {
    const moved = now - step;
    const old = seen;
    step = now;
    seen = read();
    if (!seen || !host.clientWidth) return false;
    const wanted = [step, host.clientWidth, context.theme, seen.count, store.of(spec.tensor).version, store.of(spec.codes || spec.tensor)?.version, store.of(spec.levels || spec.scale || spec.tensor)?.version].join(" ");
    if (wanted === key) return true;
    key = wanted;
    before = old && old.levels && seen.levels && old.levels.length === seen.levels.length ? old : null;
    began = moved === 1 && !calm() && !context.bare ? performance.now() : -Infinity;
    paint();
    canvas.setAttribute("aria-label", describe());
    cursor.refresh();
    return true;
  };

  const paint = () => {
    cancelAnimationFrame(frame);
    if (!wrap.isConnected || !seen) return;
    plan = lay();
    const pen = sized(canvas, plan.width, plan.height);
    pen.clearRect(0, 0, plan.width, plan.height);
    const t = Math.min(1, (performance.now() - began) / PANE_SETTLE);
    plan.boxes.forEach((box) => paintPane(pen, box));
    canvas.dataset.boxes = JSON.stringify(plan.boxes.map(({ x, y, name }) => ({ x, y, name, cw: plan.cw, ch: plan.ch })));
    const range = plan.lines.length ? spanOf() : null; // levels may arrive after values
    for (const line of plan.lines) {
      numberLine(pen, line, context, {
        ...range,
        levels: fall(before?.levels[line.block], seen.levels[line.block], t),
        items: itemsOf(line.block),
        now: spec.seen && seen.count > 0 && seen.count < seen.total ? seen.count - 1 : -1,
        landed: spec.seen && t < 1 && seen.count > (before ? before.count : 0) ? { from: before ? before.count : 0, t: 1 - (1 - t) ** 3 } : null,
        hovered: hovered ? order(hovered) : -1,
        names: codeNames(),
        scale: seen.scales ? seen.scales[line.block] : null,
        zero: seen.zeros ? seen.zeros[line.block] : null,
        title: blockTitle(line.block),
      });
    }
    if (t < 1) frame = requestAnimationFrame(paint);
  };

  const blockTitle = (b) => (seen.levels.length === 1 ? "" : `${spec.block_word} ${b + 1} of ${seen.levels.length}`);

  const codeNames = () => {
    const [low, high] = codeRange();
    // Of a format with very many levels only those in use are drawn, and have no number.
    return Array.from({ length: Math.min(high - low + 1, seen.levels[0].length) }, (_, n) => (high - low + 1 === seen.levels[0].length ? low + n : null));
  };

  /** One scale for the whole run: values and levels, as far as they are known. */
  const spanOf = () => {
    const ends = [store.of(spec.tensor).range(), spec.levels && store.of(spec.levels) ? store.of(spec.levels).range() : [Math.min(...seen.levels.flat()), Math.max(...seen.levels.flat())]];
    const low = Math.min(...ends.map((e) => e[0]));
    const high = Math.max(...ends.map((e) => e[1]));
    const room = (high - low || 1) * 0.04;
    return { low: low - room, high: high + room };
  };

  const itemsOf = (b) => {
    const items = [];
    for (let n = 0; n < seen.total; n += 1) {
      const { i, j } = place(n);
      if (seen.block(i, j) !== b) continue;
      const level = seen.back ? nearestLevel(seen.levels[b], seen.back[i][j]) : -1;
      items.push({ n, value: seen.values[i][j], level, done: n < seen.count });
    }
    return items;
  };

  const paintPane = (pen, box) => {
    const { role, scale } = context.colours;
    const table = scale(box.colours);
    const [low, high] = box.range;
    const numbers = plan.cw >= PANE_LEGIBLE && !context.bare;
    const gap = plan.cw > 14 ? 1.5 : plan.cw > 6 ? 0.5 : 0;
    pen.font = `600 12px ${context.fonts.text}`;
    pen.textAlign = "left";
    pen.textBaseline = "alphabetic";
    pen.fillStyle = role("muted");
    if (!context.bare) pen.fillText(box.label, box.x, box.y - 7);
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    for (let n = 0; n < seen.total; n += 1) {
      const { i, j } = place(n);
      const [x, y] = [box.x + j * plan.cw, box.y + i * plan.ch];
      const there = box.all || n < seen.count;
      const value = box.rows[i][j];
      const t = Math.max(0, Math.min(1, ((box.size ? Math.abs(value) : value) - low) / (high - low || 1)));
      const colour = table[Math.round(t * 255)];
      pen.fillStyle = there ? css(colour) : role("sunk");
      pen.fillRect(x + gap, y + gap, plan.cw - 2 * gap, plan.ch - 2 * gap);
      if (numbers && there) {
        pen.fillStyle = wantsDarkInk(colour) ? "#1b1f24" : "#fffdf8";
        pen.font = `${plan.cw < 44 ? 11 : 13}px ${context.fonts.mono}`;
        pen.fillText(figure(value, box.whole), x + plan.cw / 2, y + plan.ch / 2 + 0.5, plan.cw - 4);
      }
    }
    if (!context.bare) outlines(pen, box);
  };

  /** The value at work, and the cell that is pointed at in another pane. */
  const outlines = (pen, box) => {
    const ring = (cell, colour) => {
      pen.strokeStyle = colour;
      pen.lineWidth = 2;
      pen.strokeRect(box.x + cell.j * plan.cw + 1, box.y + cell.i * plan.ch + 1, plan.cw - 2, plan.ch - 2);
    };
    if (spec.seen && seen.count > 0 && seen.count < seen.total) ring(place(seen.count - 1), context.colours.role("ink"));
    if (hovered && hovered.i < seen.rows && hovered.j < seen.columns) ring(hovered, context.colours.role("key"));
  };

  const figure = (value, whole) => {
    if (whole) return format(value, ".0f");
    const size = Math.abs(value) < 1e-6 * seen.bound ? 0 : Math.abs(value);
    if (size !== 0 && (size < 0.005 || size >= 1000)) return value.toExponential(0).replace("-", "−").replace("e+", "e");
    return format(size ? value : 0, size < 0.1 && plan.cw > 50 && size !== 0 ? ".3f" : ".2f");
  };

  const describe = () => {
    const list = plan.boxes.map((box) => box.label).join(", ");
    const far = spec.seen && seen.count < seen.total ? ` ${seen.count} of ${seen.total} values are through.` : "";
    return `${spec.title}: ${seen.rows} rows and ${seen.columns} columns, as ${list}.${far} Arrow keys read cells${spec.cell || spec.edit ? ", Enter opens one" : ""}.`;
  };

  const point = (cell) => {
    const same = cell && hovered ? cell.i === hovered.i && cell.j === hovered.j : cell === hovered;
    hovered = cell ? { i: cell.i, j: cell.j } : null;
    if (!same) paint();
  };

  const inside = (cell) => cell && cell.i >= 0 && cell.j >= 0 && cell.i < seen.rows && cell.j < seen.columns;

  const grid = {
    find(x, y) {
      if (!plan) return null;
      for (const [pane, box] of plan.boxes.entries()) {
        const cell = { pane, i: Math.floor((y - box.y) / plan.ch), j: Math.floor((x - box.x) / plan.cw) };
        if (inside(cell)) {
          point(cell);
          return cell;
        }
      }
      point(null);
      return null;
    },
    box(cell) {
      const box = plan?.boxes[cell.pane];
      return box && inside(cell) ? { x: box.x + cell.j * plan.cw, y: box.y + cell.i * plan.ch, width: plan.cw, height: plan.ch } : null;
    },
    move(cell, down, right) {
      if (!plan) return null;
      const to = cell ? { ...cell, i: cell.i + down, j: cell.j + right } : { pane: 0, i: 0, j: 0 };
      // Past the edge of a pane lies the next one.
      if (right && to.j === seen.columns && plan.boxes[to.pane + 1]) Object.assign(to, { pane: to.pane + 1, j: 0 });
      if (right && to.j < 0 && to.pane > 0) Object.assign(to, { pane: to.pane - 1, j: seen.columns - 1 });
      const next = inside(to) ? to : cell;
      point(next);
      return next;
    },
    lines(cell) {
      const through = order(cell) < seen.count;
      const told = plan.boxes.filter((box) => box.all || through).map((box) => `${box.label} ${box.whole ? format(box.rows[cell.i][cell.j], ".0f") : short(box.rows[cell.i][cell.j])}`);
      const b = seen.block(cell.i, cell.j);
      const scale = seen.scales ? `scale ${short(seen.scales[b])}${seen.zeros ? `, zero point ${short(seen.zeros[b])}` : ""}` : "";
      return [told[0], ...told.slice(1), scale, `row ${cell.i + 1}, column ${cell.j + 1}${seen.levels && seen.levels.length > 1 ? ` · ${blockTitle(b)}` : ""}`].filter(Boolean);
    },
    open(cell) {
      if (cell.pane === 0 && spec.pick) return context.turn(spec.pick.knob, String(Number(seen.values[cell.i][cell.j].toPrecision(7))));
      if (cell.pane === 0 && spec.edit && (!spec.editable || scalar(spec.editable))) return context.edit?.(spec.edit.knob, cell.i, cell.j);
      return spec.cell ? context.open({ row: cell.i, column: cell.j }) : null;
    },
  };

  const cursor = createCursor(wrap, canvas, context.tip, grid, context.announce);
  canvas.addEventListener("pointerleave", () => point(null));

  return {
    draw,
    resize() {
      key = "";
      draw(step);
    },
    dispose() {
      cancelAnimationFrame(frame);
      wrap.remove();
    },
    origin: () => (spec.editable && scalar(spec.editable) ? "typed in" : ""),
    scale: () => (seen ? { table: context.colours.scale("diverging"), bounds: [-seen.bound, seen.bound], power: 1 } : null),
    table() {
      if (!seen || !plan) return { columns: [], rows: [] };
      const rows = Array.from({ length: Math.min(seen.total, 256) }, (_, n) => {
        const { i, j } = place(n);
        return [`row ${i + 1}, column ${j + 1}`, ...plan.boxes.map((box) => (box.all || n < seen.count ? (box.whole ? format(box.rows[i][j], ".0f") : short(box.rows[i][j])) : ""))];
      });
      return { columns: ["cell", ...plan.boxes.map((box) => box.label)], rows };
    },
  };
}

/** Which of the rising levels is nearest. */
function nearestLevel(levels, value) {
  let low = 0;
  let high = levels.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (levels[middle] < value && levels[middle + 1] <= value) low = middle + 1;
    else if (levels[middle] < value && value - levels[middle] > levels[middle + 1] - value) low = middle + 1;
    else high = middle;
  }
  return low;
}

function largestSize(rows) {
  return Math.max(1e-30, ...rows.flat().map(Math.abs));
}
