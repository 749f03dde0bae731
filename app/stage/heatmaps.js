/**
 * Heatmaps: a matrix, or one a facet, in colour. A growing tensor is drawn row by row up to the player's step, and what
 * is already drawn stays; of any other tensor the newest frame is drawn.
 */
import { blit, tiles } from "./blit.js";
import { css } from "./colours.js";
import { createCursor } from "./cursor.js";
import { make, sized } from "./dom.js";
import { arrange } from "./facets.js";
import { Matrix } from "./matrix.js";
import { surround } from "./surround.js";
import { short, visible } from "./text.js";

const TALLEST = 430; // the tallest a heatmap gets

export function heatmaps(host, spec, context) {
  const { store } = context;
  const matrix = new Matrix(store, spec);
  const canvas = make("canvas", { role: "application", tabindex: context.bare ? null : 0, class: "pixels" });
  const wrap = make("div", { class: "canvas-wrap" }, canvas);
  host.append(wrap);
  let pen = null;
  let plan = null;
  let drawn = { key: "", lines: 0, lit: 0, frame: "" };
  let step = 0;
  let chosen = typeof spec.focus === "number" ? spec.focus : 0;

  const focus = () => {
    if (context.single) return Math.min(chosen, matrix.facets - 1);
    if (spec.focus === null || spec.focus === undefined || matrix.facets === 1 || context.bare) return null;
    const knob = spec.focus.knob ? context.knobs[spec.focus.knob] : chosen;
    return Math.min(Number(knob), matrix.facets - 1);
  };

  const label = (axis, i) => {
    const named = axis === spec.rows ? spec.row_labels : axis === spec.columns ? spec.column_labels : "";
    if (Array.isArray(named)) return named[i] ?? "";
    return named === "tokens" && store.pieces[i] !== undefined ? visible(store.pieces[i]) : "";
  };

  const scene = () => ({ pen, matrix, spec, context, label, ground: ground() });

  /** Lay out again: the width, the extents or the focus changed. */
  const lay = (key) => {
    const width = host.clientWidth;
    const words = Array.isArray(spec.row_labels) || (spec.row_labels === "tokens" && matrix.rows <= 72);
    const margin = context.bare ? { left: 1, top: 1 } : { left: words ? 84 : 32, top: 18 };
    const square = matrix.ragged || spec.gaps;
    const tallest = context.height || (focus() === null && matrix.facets > 4 ? 620 : TALLEST);
    plan = arrange(matrix, { width, height: tallest }, { focus: focus(), single: context.single, margin, stretch: !square, most: spec.gaps ? 26 : 34 });
    pen = sized(canvas, plan.width, plan.height);
    pen.clearRect(0, 0, plan.width, plan.height);
    canvas.dataset.boxes = JSON.stringify(plan.boxes); // where cells are, for tests of pixels
    plan.boxes.forEach((box) => surround(scene(), box));
    drawn = { key, lines: 0, lit: 0, frame: "" };
  };

  /** Where nothing is (yet): as if it were the lowest value, where that is a bound of the quantity; else sunk. */
  const ground = () => (matrix.track.about.low === 0 ? css(colourTables()[1][0]) : context.colours.role("sunk"));

  const colourTables = () => {
    const { scale, dimmed, states } = context.colours;
    if (spec.states.length) return [states(spec.state_colours), states(spec.state_colours)];
    return [scale(spec.colours), spec.lit ? dimmed(spec.colours) : scale(spec.colours)];
  };

  const draw = (now) => {
    step = now;
    if (!matrix.measure() || !host.clientWidth) return false;
    const [low, high] = matrix.bounds();
    const words = spec.row_labels ? store.pieces.length : 0;
    const marked = spec.gaps ? `${context.knobs[spec.rows]} ${context.knobs[spec.columns]}` : "";
    const key = [matrix.key, host.clientWidth, focus(), context.theme, low, high, words, marked].join(" ");
    if (key !== drawn.key) lay(key);
    const veil = spec.veil ? store.of(spec.veil) : null;
    const lines = Math.min(matrix.linesAt(step), spec.veil && matrix.mode === "down" ? (veil ? veil.count : 0) : Infinity);
    const litTrack = spec.lit ? store.of(spec.lit) : null;
    const lit = litTrack ? litTrack.scalarAt(step) ?? 0 : 0;
    const newest = matrix.mode === "frame" ? `${matrix.track.countAt(step)} ${veil ? veil.countAt(step) : 0}` : "";
    repaint(changed({ lines, lit, frame: newest }), lines, lit);
    drawn = { key, lines, lit, frame: newest };
    canvas.setAttribute("aria-label", describe());
    cursor.refresh();
    return true;
  };

  /** Which lines look different now: those added or taken away, and those that changed between lit and dim. */
  const changed = (now) => {
    if (now.frame !== drawn.frame) return [0, matrix.rows];
    let [from, to] = [Math.min(now.lines, drawn.lines), Math.max(now.lines, drawn.lines)];
    if (now.lit !== drawn.lit) {
      from = Math.min(from, now.lit, drawn.lit);
      to = Math.max(to, now.lit, drawn.lit);
    }
    return [from, Math.min(to, matrix.mode === "across" ? matrix.columns : matrix.rows)];
  };

  const repaint = ([from, to], lines, lit) => {
    if (to <= from) return;
    const painted = Math.min(to, lines);
    if (painted > from) matrix.paint(from, painted, step, ...colourTables(), lit, spec.veil ? context.colours.closed(spec.colours) : null);
    for (const box of plan.boxes) {
      if (spec.gaps) tiles(scene(), box, lines, spec.veil ? (i, j) => matrix.masked({ i, j }, step) : null);
      else blit(scene(), box, from, to, lines);
    }
  };

  const describe = () => {
    const grown = matrix.mode === "frame" ? "" : `, ${matrix.linesAt(step)} ${matrix.mode === "down" ? "rows" : "columns"} so far`;
    const many = matrix.facets > 1 ? `${matrix.facets} matrices, one a ${spec.facet}; ` : "";
    return `${spec.title || matrix.track.about.name}: ${many}${spec.rows} down, ${spec.columns} to the right${grown}. Arrow keys read cells, Enter opens one.`;
  };

  const grid = {
    find(x, y) {
      if (!plan) return null;
      for (const box of plan.boxes) {
        const i = Math.floor((y - box.y) / box.ch);
        const j = Math.floor((x - box.x) / box.cw);
        const inside = i >= 0 && j >= 0 && i < matrix.rows && j < matrix.columns;
        if (inside && matrix.locate({ facet: box.facet, i, j }, step)) return { facet: box.facet, i, j };
      }
      return null;
    },
    box(cell) {
      const box = plan && plan.boxes.find((b) => b.facet === cell.facet);
      if (!box || !matrix.locate(cell, step)) return null;
      return { x: box.x + cell.j * box.cw, y: box.y + cell.i * box.ch, width: box.cw, height: box.ch };
    },
    move(cell, down, right) {
      const lines = matrix.linesAt(step);
      if (!lines || !plan) return null;
      if (!cell) return { facet: plan.boxes[0].facet, i: matrix.mode === "down" ? lines - 1 : 0, j: 0 };
      const next = { facet: cell.facet, i: cell.i + down, j: cell.j + right };
      return next.i >= 0 && next.j >= 0 && matrix.locate(next, step) ? next : cell;
    },
    lines(cell) {
      const named = (axis, i) => `${axis} ${i}${label(axis, i) ? ` “${label(axis, i)}”` : ""}`;
      const at = matrix.locate(cell, step);
      const coded = matrix.track.row(at.r).coded && !matrix.track.exact.has(at.r);
      if (coded) context.exact(matrix.track, at.r);
      const { symbol, unit } = matrix.track.about;
      const amount = `${symbol ? `${symbol} ` : ""}${coded ? "≈" : "="} ${short(matrix.track.value(at.r, at.place))} ${unit || ""}`;
      const value = spec.states.length ? spec.states[Math.round(matrix.track.value(at.r, at.place))] ?? "" : amount;
      const place = `${named(spec.rows, cell.i)} · ${named(spec.columns, cell.j)}`;
      const out = matrix.masked(cell, step);
      return [value.trim(), place, ...(matrix.facets > 1 ? [`${spec.facet} ${cell.facet}`] : []), ...(out ? ["left out by the mask"] : [])];
    },
    open(cell) {
      const small = focus() !== null && cell.facet !== focus();
      if (small && spec.focus.knob) return context.turn(spec.focus.knob, cell.facet);
      if (small) {
        chosen = cell.facet;
        return draw(step);
      }
      if (spec.cell) return context.open(positions(cell));
      for (const [axis, at] of [[spec.rows, cell.i], [spec.columns, cell.j]]) {
        if (context.knobs[axis] !== undefined) context.turn(axis, at);
      }
      return null;
    },
  };

  const positions = ({ facet, i, j }) => ({ [spec.rows]: i, [spec.columns]: j, ...(spec.facet ? { [spec.facet]: facet } : {}) });
  const cursor = createCursor(wrap, canvas, context.tip, grid, context.announce);

  return {
    draw,
    resize() {
      drawn.key = "";
      draw(step);
    },
    dispose() {
      wrap.remove();
    },
    scale: () => (matrix.measure() ? { table: colourTables()[0], bounds: matrix.bounds(), power: spec.power ?? 1, states: spec.states } : null),
    /** The matrix in focus, as numbers: the newest forty rows. */
    table() {
      if (!matrix.measure()) return { columns: [], rows: [] };
      const facet = focus() ?? 0;
      const to = matrix.mode === "down" ? matrix.linesAt(step) : matrix.rows;
      const from = Math.max(0, to - 40);
      const across = Math.min(matrix.mode === "across" ? matrix.linesAt(step) : matrix.columns, 200);
      const rows = [];
      for (let i = from; i < to; i += 1) {
        const values = Array.from({ length: across }, (_, j) => matrix.value({ facet, i, j }, step));
        rows.push([label(spec.rows, i) || i, ...values.map((v) => (v === null ? "" : spec.states[Math.round(v)] ?? short(v)))]);
      }
      const head = Array.from({ length: across }, (_, j) => label(spec.columns, j) || j);
      return { columns: [`${spec.rows} \\ ${spec.columns}`, ...head], rows };
    },
  };
}
