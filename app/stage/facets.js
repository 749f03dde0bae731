/**
 * Where each matrix of a heatmap stands: alone, one large and the others beside it, or all alike in a grid.
 * Plain geometry: numbers in, boxes out.
 */
import { ratio } from "./glass.js";

const GAP = 12;
const NAME = 15; // room for a small one's name
const LONGEST_SIDE = 260; // how tall a stretched one gets: its rows need not be square

/**
 * `shape` {facets, rows, columns}; `room` {width, height}; `margin` {left, top} around the large one for its labels.
 * Returns {width, height, boxes}: a box {facet, x, y, cw, ch, large} has cells of cw by ch pixels.
 */
export function arrange(shape, room, { focus = null, single = false, margin, stretch = false, most = 34 }) {
  const { facets } = shape;
  if (facets === 1 || single) return alone(shape, room, margin, stretch, most, focus ?? 0);
  const lay = stretch ? filling : alike;
  if (focus === null) return lay(shape, room, allOf(facets), 0, 0);
  const others = allOf(facets).filter((f) => f !== focus);
  if (stretch || room.width < 460) return stacked(shape, room, focus, others, margin, lay, stretch);
  return beside(shape, room, focus, others, margin);
}

function allOf(count) {
  return Array.from({ length: count }, (_, i) => i);
}

/** A cell's size: whole device pixels, so that all are alike, unless that would leave much of the room empty. */
function whole(size, most = Infinity) {
  const scale = ratio();
  const capped = Math.min(size, most);
  const even = Math.floor(capped * scale) / scale;
  return even >= 0.88 * capped ? even : capped;
}

function alone(shape, room, margin, stretch, most, facet) {
  const cw = whole((room.width - margin.left) / shape.columns, most);
  const square = whole(Math.min(cw, (room.height - margin.top) / shape.rows));
  const ch = stretch ? whole(Math.min(LONGEST_SIDE / shape.rows, 18)) : square;
  const box = { facet, x: margin.left, y: margin.top, cw: stretch ? cw : square, ch, large: true };
  return { width: room.width, height: margin.top + ch * shape.rows + 4, boxes: [box] };
}

/** All of one size, as large as fits: tries every number of columns. */
function alike(shape, room, list, left, top) {
  let best = { size: 0, across: 1 };
  for (let across = 1; across <= list.length; across += 1) {
    const down = Math.ceil(list.length / across);
    const w = (room.width - GAP * (across - 1)) / across / shape.columns;
    const h = ((room.height - GAP * (down - 1)) / down - NAME) / shape.rows;
    const size = Math.min(w, h);
    if (size > best.size) best = { size, across };
  }
  const cell = whole(best.size, 14);
  const boxes = list.map((facet, n) => ({
    facet,
    x: left + (n % best.across) * (cell * shape.columns + GAP),
    y: top + NAME + Math.floor(n / best.across) * (cell * shape.rows + GAP + NAME),
    cw: cell,
    ch: cell,
    large: false,
  }));
  const down = Math.ceil(list.length / best.across);
  return { width: room.width, height: top + down * (cell * shape.rows + GAP + NAME), boxes };
}

/** All of one size, as wide as the room: cells need not be square. A few stand one under the other. */
function filling(shape, room, list, left, top) {
  const across = list.length <= 4 ? 1 : list.length <= 12 ? 4 : 8;
  const down = Math.ceil(list.length / across);
  const width = (room.width - left - GAP * (across - 1)) / across;
  const height = Math.max(24, Math.min(96, (LONGEST_SIDE * 1.2) / down - NAME - GAP));
  const boxes = list.map((facet, n) => ({
    facet,
    x: left + (n % across) * (width + GAP),
    y: top + NAME + Math.floor(n / across) * (height + GAP + NAME),
    cw: whole(width / shape.columns),
    ch: whole(height / shape.rows),
    large: false,
  }));
  return { width: room.width, height: top + down * (height + GAP + NAME), boxes };
}

function beside(shape, room, focus, others, margin) {
  const share = others.length > 12 ? 0.5 : 0.6;
  const cell = whole(Math.min((room.width * share - margin.left) / shape.columns, (room.height - margin.top) / shape.rows), 30);
  const large = { facet: focus, x: margin.left, y: margin.top, cw: cell, ch: cell, large: true };
  const left = margin.left + cell * shape.columns + 2 * GAP;
  const height = margin.top + cell * shape.rows;
  const small = alike(shape, { width: room.width - left, height: height + GAP }, others, left, 0);
  return { width: room.width, height: Math.max(height, small.height - GAP) + 4, boxes: [large, ...small.boxes] };
}

function stacked(shape, room, focus, others, margin, lay, stretch) {
  const cw = whole((room.width - margin.left) / shape.columns, 30);
  const ch = stretch ? whole(LONGEST_SIDE / 1.5 / shape.rows) : cw;
  const large = { facet: focus, x: margin.left, y: margin.top, cw, ch, large: true };
  const top = margin.top + ch * shape.rows + GAP;
  const small = lay(shape, { width: room.width, height: 230 }, others, 0, top);
  return { width: room.width, height: small.height, boxes: [large, ...small.boxes] };
}
