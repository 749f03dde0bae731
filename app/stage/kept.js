/** What a live page would ask the engine, answered from a recording's pieces (app/still.py, app/opened.py). */

const MOST_SHOWN = 4096; // values of a tensor that the page looks at in one piece

/** Row number `row` of a recorded tensor (as app/still.py keeps it), the axes in `picks` gone. */
export function exactRow(tensor, row, picks) {
  const { shape, offset, size } = rowOf(tensor, row);
  if (size === undefined) return null;
  const fixed = tensor.axes.map((axis) => (axis in picks ? picks[axis] : null));
  let places = [0];
  shape.forEach((extent, axis) => {
    const stride = shape.slice(axis + 1).reduce((a, b) => a * b, 1);
    const along = fixed[axis] === null ? [...Array(extent).keys()] : [fixed[axis]];
    places = places.flatMap((place) => along.map((i) => place + i * stride));
  });
  return Float32Array.from(places, (place) => tensor.data[offset + place]);
}

function rowOf(tensor, row) {
  const rank = tensor.axes.length;
  if (row < 0 || row >= tensor.at.length) return {};
  const sizes = (r) => [...tensor.shapes.subarray(r * rank, (r + 1) * rank)];
  const count = (r) => sizes(r).reduce((a, b) => a * b, 1);
  let offset = 0;
  for (let r = 0; r < row; r += 1) offset += count(r);
  return { shape: sizes(row), offset, size: count(row) };
}

/** A recorded tensor as a `rows` message brings it (app/picture.py), the axes in `picks` gone, shorter rows padded. */
export function rowsFrom(tensor, picks) {
  const rank = tensor.axes.length;
  const free = tensor.axes.map((axis, i) => (axis in picks ? -1 : i)).filter((i) => i >= 0);
  const rows = Array.from(tensor.at, (_, r) => ({ own: free.map((i) => tensor.shapes[r * rank + i]), values: exactRow(tensor, r, picks) }));
  const shape = free.map((_, i) => Math.max(0, ...rows.map(({ own }) => own[i])));
  const size = shape.reduce((a, b) => a * b, 1);
  const data = new Float32Array(rows.length * size);
  rows.forEach(({ own, values }, r) => {
    values.forEach((value, from) => {
      let rest = from;
      let to = r * size;
      let stride = 1;
      for (let axis = own.length - 1; axis >= 0; axis -= 1) {
        to += (rest % own[axis]) * stride;
        rest = Math.floor(rest / own[axis]);
        stride *= shape[axis];
      }
      data[to] = value;
    });
  });
  const same = !shape.length || rows.every(({ own }) => own.every((extent, i) => extent === shape[i]));
  const none = new Float32Array(0);
  return { start: 0, at: tensor.at, shape, data, lo: none, hi: none, widths: Int32Array.from(same ? [] : rows.map(({ own }) => own[own.length - 1])) };
}

/** All rows of a recorded tensor in one array, as the engine's `Track.stack` gives it: shorter rows end in zeros. */
export function wholeOf(tensor) {
  const rank = tensor.axes.length;
  const count = tensor.at.length;
  const sizes = Array.from({ length: rank }, (_, axis) => Math.max(0, ...Array.from({ length: count }, (__, r) => tensor.shapes[r * rank + axis])));
  const shape = [...sizes];
  shape.splice(tensor.grows ?? 0, 0, count);
  const strides = shape.map((_, axis) => shape.slice(axis + 1).reduce((a, b) => a * b, 1));
  const [across] = strides.splice(tensor.grows ?? 0, 1);
  const data = new tensor.data.constructor(shape.reduce((a, b) => a * b, 1));
  let from = 0;
  for (let r = 0; r < count; r += 1) {
    const own = [...tensor.shapes.subarray(r * rank, (r + 1) * rank)];
    const size = own.reduce((a, b) => a * b, 1);
    for (let i = 0; i < size; i += 1) {
      let rest = i;
      let to = r * across;
      for (let axis = rank - 1; axis >= 0; axis -= 1) {
        to += (rest % own[axis]) * strides[axis];
        rest = Math.floor(rest / own[axis]);
      }
      data[to] = tensor.data[from + i];
    }
    from += size;
  }
  return { shape, data };
}

/** The newest row of a tensor at a step, or at the end: a `tensor` message; null before there is any. */
export function tensorAt(tensor, key, step) {
  let row = -1;
  while (row + 1 < tensor.at.length && (typeof step !== "number" || tensor.at[row + 1] <= step)) row += 1;
  if (row < 0) return null;
  const { shape, offset, size } = rowOf(tensor, row);
  const data = Float32Array.from(tensor.data.subarray(offset, offset + Math.min(size, MOST_SHOWN)));
  return { type: "tensor", key, shape, data, more: size > MOST_SHOWN };
}

/**
 * The arithmetic of the cell `at`, at `step`: {title, lines, note, vectors}; or {nearest: the words for the nearest cell
 * that is kept, count: how many are}.
 */
export function cellOf(cells, at, step) {
  const places = cells.axes.map((axis) => at[axis]);
  if (places.some((place, i) => !Number.isInteger(place) || place < 0 || place >= cells.sizes[i])) return { count: cells.keys.length };
  let frame = 0;
  while (frame + 1 < cells.frames.length && cells.frames[frame + 1] <= step) frame += 1;
  const frames = Math.max(1, cells.frames.length);
  const key = places.reduce((number, place, i) => number * cells.sizes[i] + place, 0) * frames + frame;
  const index = indexOf(cells).get(key);
  return index === undefined ? { nearest: nearestKept(cells, places, frame), count: cells.keys.length, whole: cells.whole } : answerOf(cells, index);
}

const indices = new WeakMap();

function indexOf(cells) {
  if (!indices.has(cells)) indices.set(cells, new Map([...cells.keys].map((key, i) => [key, i])));
  return indices.get(cells);
}

const starts = new WeakMap();

/** Where each answer's texts and vectors begin: their number depends on its form. */
function startsOf(cells) {
  if (!starts.has(cells)) {
    const words = new Int32Array(cells.form.length + 1);
    const bars = new Int32Array(cells.form.length + 1);
    cells.form.forEach((form, i) => {
      const [lines, vectors] = cells.forms[form];
      words[i + 1] = words[i] + 2 + 2 * lines + vectors;
      bars[i + 1] = bars[i] + vectors;
    });
    const rows = new Int32Array(cells.lengths.length + 1);
    cells.lengths.forEach((length, i) => {
      rows[i + 1] = rows[i] + length;
    });
    starts.set(cells, { words, bars, rows });
  }
  return starts.get(cells);
}

function answerOf(cells, i) {
  const { words, bars, rows } = startsOf(cells);
  const [lines, vectors] = cells.forms[cells.form[i]];
  const text = (k) => cells.texts[cells.words[words[i] + k]];
  const own = [];
  for (let k = 0; k < vectors; k += 1) {
    const bar = cells.bars[bars[i] + k];
    const [a, b] = [Math.floor((-bar - 1) / 16), (-bar - 1) % 16];
    own.push(bar >= 0 ? [...cells.numbers.subarray(rows[bar], rows[bar + 1])] : own[a].map((value, n) => value * own[b][n]));
  }
  return {
    title: text(0),
    note: text(1),
    lines: Array.from({ length: lines }, (_, k) => [text(2 + 2 * k), text(3 + 2 * k)]),
    vectors: own.map((numbers, k) => [text(2 + 2 * lines + k), numbers]),
  };
}

/** Words for the kept cell that is nearest to `places`, and the step at which it is kept. */
function nearestKept(cells, places, frame) {
  const frames = Math.max(1, cells.frames.length);
  let best = Infinity;
  let found = null;
  for (const key of cells.keys) {
    const at = key % frames;
    let rest = Math.floor(key / frames);
    let far = Math.abs(at - frame);
    const there = [];
    for (let i = cells.sizes.length - 1; i >= 0; i -= 1) {
      there[i] = rest % cells.sizes[i];
      rest = Math.floor(rest / cells.sizes[i]);
      far += Math.abs(there[i] - places[i]);
    }
    if (far < best) {
      best = far;
      found = { there, at };
    }
  }
  if (!found) return "";
  const words = cells.axes.map((axis, i) => `${axis} ${found.there[i]}`).join(", ");
  return cells.frames.length ? `${words} at step ${cells.frames[found.at]}` : words;
}
