/**
 * What the engine recorded, as it arrives: tracks of rows, and the text's tokens. Views read from here and keep
 * nothing of their own, so that scrubbing back is reading an earlier row.
 */

/** A plain typed array over the same memory. Bokeh's own subclasses must not be sliced: they forget offsets. */
export function plain(array) {
  if (!array) return new Float32Array(0);
  for (const Kind of [Uint8Array, Int32Array, Float32Array, Float64Array]) {
    if (array instanceof Kind) return new Kind(array.buffer, array.byteOffset, array.length);
  }
  if (ArrayBuffer.isView(array)) return Float64Array.from(array);
  return Float64Array.from(array);
}

/** One named tensor: rows, the step at which each appeared, and how to read their codes. */
export class Track {
  constructor(id, about) {
    this.id = id;
    this.version = 0; // raised by every append: what was computed from the rows is out of date
    this.at = [];
    this.chunks = [];
    this.exact = new Map();
    this.describe(about);
  }

  describe(about) {
    this.about = about;
    this.axes = about.axes || [];
  }

  /** Take a `rows` message. Rows that are here already (sent again, or sent ahead) are left out. */
  append(message) {
    const at = plain(message.at);
    const known = this.at.length - message.start;
    if (known < 0 || known >= at.length) return;
    const shape = [...message.shape];
    const size = shape.reduce((a, b) => a * b, 1);
    this.chunks.push({
      start: this.at.length,
      shape,
      size,
      data: plain(message.data).subarray(known * size),
      lo: plain(message.lo).subarray(known),
      hi: plain(message.hi).subarray(known),
      widths: plain(message.widths).subarray(known),
    });
    for (const step of at.subarray(known)) this.at.push(step);
    this.version += 1;
  }

  get count() {
    return this.at.length;
  }

  /** How many rows there are at `step`: binary search, since rows come in order. */
  countAt(step) {
    let low = 0;
    let high = this.at.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.at[middle] <= step) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  chunk(r) {
    let low = 0;
    let high = this.chunks.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.chunks[middle].start <= r) low = middle;
      else high = middle - 1;
    }
    return this.chunks[low];
  }

  /**
   * Row r as it lies in memory: data from `offset` on, `size` values, `width` of the last axis in use. For codes, lo
   * and hi say what they mean; `coded` is false for plain numbers.
   */
  row(r) {
    const chunk = this.chunk(r);
    const i = r - chunk.start;
    const coded = chunk.lo.length > 0;
    return {
      data: chunk.data,
      offset: i * chunk.size,
      size: chunk.size,
      shape: chunk.shape,
      width: chunk.widths.length ? chunk.widths[i] : chunk.shape.length ? chunk.shape[chunk.shape.length - 1] : 1,
      coded,
      lo: coded ? chunk.lo[i] : 0,
      hi: coded ? chunk.hi[i] : 0,
    };
  }

  /** The value of one place of row r: exact where the exact row is known, decoded otherwise. */
  value(r, place) {
    const row = this.row(r);
    const known = this.exact.get(r);
    if (known) return known[unpadded(place, row)];
    const raw = row.data[row.offset + place];
    return row.coded ? row.lo + (row.hi - row.lo) * (raw / 255) ** this.about.power : raw;
  }

  /** Row r as numbers, as many as its last axis has in use; of a matrix, those of its row `i`. A scalar is one number. */
  numbers(r, i = 0) {
    const { shape, width } = this.row(r);
    if (!shape.length) return [this.value(r, 0)];
    const from = i * shape[shape.length - 1];
    return Array.from({ length: width }, (_, j) => this.value(r, from + j));
  }

  /** A row of a scalar track. */
  scalar(r) {
    return this.value(r, 0);
  }

  /** The newest value of a scalar track at `step`, or null. */
  scalarAt(step) {
    const count = this.countAt(step);
    return count ? this.scalar(count - 1) : null;
  }

  get coded() {
    return this.chunks.length > 0 && this.chunks[0].lo.length > 0;
  }

  /** Steps between places along an axis of a row; -1 when the row has no such axis. */
  stride(axis, shape) {
    const place = this.axes.indexOf(axis);
    if (place < 0) return -1;
    return shape.slice(place + 1).reduce((a, b) => a * b, 1);
  }

  /** The greatest extent of an axis over the rows so far. */
  extent(axis) {
    const place = this.axes.indexOf(axis);
    if (place < 0) return axis === this.about.grows ? this.count : 1;
    return this.chunks.reduce((most, chunk) => Math.max(most, chunk.shape[place]), 0);
  }

  /** Lowest and highest value: the site's natural bounds, or what the rows so far hold. */
  range() {
    const { low, high } = this.about;
    if (low !== null && low !== undefined && high !== null && high !== undefined) return [low, high];
    if (this.rangeVersion !== this.version) {
      this.seen = this.chunks.slice(this.seenChunks || 0).reduce(widen, this.seen || [Infinity, -Infinity]);
      this.seenChunks = this.chunks.length;
      this.rangeVersion = this.version;
    }
    return [low ?? this.seen[0], high ?? this.seen[1]];
  }
}

/** Exact rows come without padding: the same place in a row whose last axis is only as wide as it is used. */
function unpadded(place, { shape, width }) {
  const full = shape.length ? shape[shape.length - 1] : 1;
  return Math.floor(place / full) * width + (place % full);
}

/** The range so far, widened by a chunk's values; of codes the bounds suffice, and padding does not count. */
function widen([low, high], chunk) {
  if (chunk.lo.length) return [chunk.lo.reduce((a, b) => Math.min(a, b), low), chunk.hi.reduce((a, b) => Math.max(a, b), high)];
  const width = chunk.shape.length ? chunk.shape[chunk.shape.length - 1] : 1;
  for (let i = 0; i < chunk.data.length; i += 1) {
    const row = Math.floor(i / chunk.size);
    if (chunk.widths.length && i % width >= chunk.widths[row]) continue;
    const value = chunk.data[i];
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

/** All that the page knows of one run. */
export class Store {
  constructor(run) {
    this.run = run;
    this.tracks = new Map();
    this.pieces = [];
    this.pieceAt = [];
    this.words = new Map();
    this.steps = 0; // computed so far
    this.total = 0; // expected
    this.model = {};
  }

  describe(tracks) {
    for (const [id, about] of Object.entries(tracks)) {
      if (this.tracks.has(id)) this.tracks.get(id).describe(about);
      else this.tracks.set(id, new Track(id, about));
    }
  }

  rows(message) {
    const track = this.tracks.get(message.track);
    if (!track) return;
    track.append(message);
    if (track.count) this.steps = Math.max(this.steps, track.at[track.count - 1] + 1);
  }

  text(message) {
    const known = this.pieces.length - message.start;
    if (known < 0) return;
    this.pieces.push(...message.pieces.slice(known));
    this.pieceAt.push(...plain(message.at).subarray(known));
  }

  /** How ids read, for views that show ids. */
  learn(message) {
    for (const [token, text] of Object.entries(message.words)) this.words.set(Number(token), text);
  }

  /** How many tokens have been read at `step`. */
  piecesAt(step) {
    return Track.prototype.countAt.call({ at: this.pieceAt }, step);
  }

  /** The track that a packed tensor names, or null while nothing of it is there. */
  of(tensor) {
    const track = tensor && tensor.track ? this.tracks.get(tensor.track) : null;
    return track && track.count ? track : null;
  }

  /** The newest row of a tensor at a step: {track, r}, or null while there is none. */
  at(tensor, step) {
    const track = this.of(tensor);
    const count = track ? track.countAt(step) : 0;
    return count ? { track, r: count - 1 } : null;
  }

  /** The newest row of a tensor at a step as numbers; null without one. */
  newest(tensor, step) {
    const found = this.at(tensor, step);
    return found && found.track.numbers(found.r);
  }

  /** The newest frame of a tensor at a step: its numbers as rows (a single row where it has one axis); null without one. */
  frame(tensor, step) {
    const found = this.at(tensor, step);
    if (!found) return null;
    const { shape } = found.track.row(found.r);
    return Array.from({ length: shape.length > 1 ? shape[0] : 1 }, (_, i) => found.track.numbers(found.r, i));
  }

  /** The newest row of a tensor at a step as it was sent (codes of states are plain numbers); null without one. */
  sent(tensor, step) {
    const found = this.at(tensor, step);
    if (!found) return null;
    const { data, offset, width } = found.track.row(found.r);
    return data.subarray(offset, offset + width);
  }

  /** Steps still to come: pictures are laid out for the whole run from the start. */
  get ahead() {
    return Math.max(0, this.total - this.steps);
  }
}
