/**
 * A tensor read as matrices, one a facet, and painted as pixels: one sheet of memory, a pixel a cell, all facets side by
 * side, so that the new row of 32 heads is one write. How large a cell is on the screen is not known here.
 */

export class Matrix {
  constructor(store, spec) {
    this.store = store;
    this.spec = spec;
    this.sheet = document.createElement("canvas");
    this.pen = this.sheet.getContext("2d");
    this.key = "";
  }

  /** Learn the extents as they are now; false while nothing has arrived. Extents cover what is still to come. */
  measure() {
    const track = this.store.of(this.spec.tensor);
    if (!track) return false;
    const { rows, columns, facet } = this.spec;
    this.track = track;
    this.mode = track.about.grows === rows ? "down" : track.about.grows === columns ? "across" : "frame";
    this.facets = facet ? Math.max(1, track.extent(facet)) : 1;
    this.ragged = false;
    this.rows = this.extent(rows);
    this.columns = this.extent(columns);
    const key = `${track.id} ${this.facets} ${this.rows} ${this.columns}`;
    if (key !== this.key) {
      this.key = key;
      this.sheet.width = this.facets * this.columns;
      this.sheet.height = this.rows;
      this.image = new ImageData(this.sheet.width, this.sheet.height);
      this.pixels = new Uint32Array(this.image.data.buffer);
    }
    return true;
  }

  /** How long an axis gets. One that is ragged (rows of growing width) still grows, and both then count tokens. */
  extent(axis) {
    const { track, store } = this;
    const known = Math.max(1, track.extent(axis));
    if (axis === track.about.grows) return known + store.ahead;
    const last = track.axes.indexOf(axis);
    const ragged = last === track.axes.length - 1 && track.chunks.some((c) => c.widths.length || c.shape[last] !== known);
    this.ragged ||= ragged;
    return ragged ? known + store.ahead : known;
  }

  /** How many lines (rows, or columns when the tensor grows to the right) stand at `step`; a frame stands whole. */
  linesAt(step) {
    if (this.mode !== "frame") return this.track.countAt(step);
    return this.track.countAt(step) ? this.rows : 0;
  }

  /** Which recorded row, and which place in it, holds a cell at `step`; null where there is none. */
  locate({ facet, i, j }, step) {
    const count = this.track.countAt(step);
    const r = this.mode === "down" ? i : this.mode === "across" ? j : count - 1;
    if (r < 0 || r >= count) return null;
    const row = this.track.row(r);
    const { places, width } = this.strides(row);
    if (this.mode !== "across" && j >= width) return null;
    const place = facet * places.facet + i * places.row + j * places.column;
    return place < row.size ? { r, place } : null;
  }

  value(cell, step) {
    const at = this.locate(cell, step);
    return at ? this.track.value(at.r, at.place) : null;
  }

  /** Strides of a recorded row along the three drawn axes (0 for the one that grows), and its width in use. */
  strides(row) {
    const stride = (axis) => Math.max(0, this.track.stride(axis, row.shape));
    const { rows, columns, facet } = this.spec;
    const places = { row: stride(rows), column: stride(columns), facet: facet ? stride(facet) : 0 };
    const last = this.track.axes[this.track.axes.length - 1];
    const full = row.shape[this.track.axes.indexOf(columns)] ?? this.columns;
    return { places, width: last === columns ? row.width : full };
  }

  /** The bounds of the colour scale: symmetric about zero when it diverges, the first and last code of states. */
  bounds() {
    if (this.spec.states.length) return [0, this.spec.states.length - 1];
    const [low, high] = this.track.range();
    if (this.spec.colours !== "diverging") return [low, high];
    const most = Math.max(Math.abs(low), Math.abs(high));
    return [-most, most];
  }

  /** Paint lines from..to of the sheet with a colour table; `from` is the first line of `lit` the bright ones. */
  paint(from, to, step, bright, dim, lit, closed) {
    const [low, high] = this.bounds();
    const newest = this.track.countAt(step) - 1;
    const veil = this.spec.veil ? this.store.of(this.spec.veil) : null;
    for (let line = from; line < to; line += 1) {
      const row = this.track.row(this.mode === "frame" ? newest : line);
      const table = line < lit ? dim : bright;
      this.paintLine(line, row, this.shader(row, table, low, high));
      const mask = veil && this.maskAt(veil, line, step);
      if (mask) this.veilLine(line, row, mask, this.shader(row, closed, low, high));
    }
    if (this.mode === "across") this.pen.putImageData(this.image, 0, 0);
    else this.pen.putImageData(this.image, 0, 0, 0, from, this.sheet.width, to - from);
  }

  paintLine(line, row, shade) {
    const { places, width } = this.strides(row);
    const across = this.mode === "across";
    const count = across ? this.rows : Math.min(width, this.columns);
    const inner = across ? places.row : places.column;
    const base = row.offset + (this.mode === "frame" ? line * places.row : 0);
    const { pixels, columns } = this;
    const stretch = this.sheet.width;
    for (let facet = 0; facet < this.facets; facet += 1) {
      const from = base + facet * places.facet;
      let pixel = across ? facet * columns + line : line * stretch + facet * columns;
      const next = across ? stretch : 1;
      for (let k = 0; k < count; k += 1, pixel += next) pixels[pixel] = shade(row.data[from + k * inner]);
      if (!across) pixels.fill(0, pixel, line * stretch + (facet + 1) * columns);
    }
  }

  /** The mask of a line: its own row where lines grow, one of the newest frame where the whole stands; else null. */
  maskAt(veil, line, step) {
    if (this.mode === "down") return line < veil.count ? veil.row(line) : null;
    const newest = veil.countAt(step) - 1;
    if (this.mode !== "frame" || newest < 0) return null;
    const frame = veil.row(newest);
    return { ...frame, offset: frame.offset + line * frame.width };
  }

  /** Whether the mask leaves a cell out. */
  masked({ i, j }, step) {
    const veil = this.spec.veil ? this.store.of(this.spec.veil) : null;
    const mask = veil && this.maskAt(veil, i, step);
    return Boolean(mask) && j < mask.width && !mask.data[mask.offset + j];
  }

  /** Paint the cells of a line anew that a mask leaves out. */
  veilLine(line, row, mask, shade) {
    const { places, width } = this.strides(row);
    const { pixels, columns, facets, sheet } = this;
    for (let facet = 0; facet < facets; facet += 1) {
      const base = row.offset + facet * places.facet + (this.mode === "frame" ? line * places.row : 0);
      const pixel = line * sheet.width + facet * columns;
      for (let j = 0; j < Math.min(width, columns, mask.width); j += 1) {
        if (!mask.data[mask.offset + j]) pixels[pixel + j] = shade(row.data[base + j * places.column]);
      }
    }
  }

  /** From what lies in memory to a colour. Codes go through a table of 256, made again only when the bounds change. */
  shader(row, table, low, high) {
    const power = this.spec.power ?? 1;
    const span = high > low ? high - low : 1;
    const colour = (value) => table[Math.round(255 * Math.min(1, Math.max(0, (value - low) / span)) ** power)];
    if (!row.coded) return (value) => colour(value);
    const key = `${row.lo} ${row.hi} ${low} ${high}`;
    if (this.codesKey !== key || this.codesOf !== table) {
      this.codesKey = key;
      this.codesOf = table;
      const spacing = this.track.about.power;
      this.codes = Uint32Array.from({ length: 256 }, (_, c) => colour(row.lo + (row.hi - row.lo) * (c / 255) ** spacing));
    }
    const { codes } = this;
    return (code) => codes[code];
  }
}
