/**
 * An animated GIF, written in the page: it needs no server, no codec and no permission, and has exactly the frames that
 * it was given. 255 colours; of each frame only what changed is stored.
 */

const COLOURS = 255; // and one that means: as before
const SAME = 255;
const FLAT = 160; // of them, taken as they are because they are frequent: grounds, lines, text

/** The colours that tell most of some frames (RGBA bytes each). */
export function paletteOf(frames) {
  const counts = new Map();
  for (const pixels of frames) {
    const words = new Uint32Array(pixels.buffer, pixels.byteOffset, pixels.length >> 2);
    for (let i = 0; i < words.length; i += 1) counts.set(words[i] & 0xffffff, (counts.get(words[i] & 0xffffff) || 0) + 1);
  }
  const all = [...counts.entries()].sort((a, b) => b[1] - a[1]);
  if (all.length <= COLOURS) return all.map(([colour]) => colour);
  const rest = all.slice(FLAT).map(([colour, count]) => ({ rgb: [colour & 255, (colour >> 8) & 255, colour >> 16], count }));
  return [...all.slice(0, FLAT).map(([colour]) => colour), ...medians(rest, COLOURS - FLAT)];
}

/** Median cut: the box with the widest spread is halved until there are enough; each stands for its mean. */
function medians(points, count) {
  const boxes = [measured(points)];
  while (boxes.length < count) {
    const widest = boxes.reduce((best, box, i) => (box.points.length > 1 && box.spread > (boxes[best]?.points.length > 1 ? boxes[best].spread : -1) ? i : best), -1);
    if (widest < 0) break;
    const { points: split, axis } = boxes[widest];
    split.sort((a, b) => a.rgb[axis] - b.rgb[axis]);
    const half = split.reduce((sum, { count: n }) => sum + n, 0) / 2;
    let seen = 0;
    let at = split.findIndex(({ count: n }) => (seen += n) >= half) + 1;
    at = Math.max(1, Math.min(split.length - 1, at));
    boxes.splice(widest, 1, measured(split.slice(0, at)), measured(split.slice(at)));
  }
  return boxes.map(({ points: inside }) => {
    const weight = inside.reduce((sum, { count: n }) => sum + n, 0);
    const [r, g, b] = [0, 1, 2].map((i) => Math.round(inside.reduce((sum, { rgb, count: n }) => sum + rgb[i] * n, 0) / weight));
    return r | (g << 8) | (b << 16);
  });
}

function measured(points) {
  const [low, high] = [[255, 255, 255], [0, 0, 0]];
  let weight = 0;
  for (const { rgb, count } of points) {
    weight += count;
    for (let i = 0; i < 3; i += 1) {
      low[i] = Math.min(low[i], rgb[i]);
      high[i] = Math.max(high[i], rgb[i]);
    }
  }
  const widths = high.map((value, i) => value - low[i]);
  const axis = widths.indexOf(Math.max(...widths));
  return { points, axis, spread: widths[axis] * Math.sqrt(weight) };
}

/** `add(pixels, hundredths)` takes RGBA bytes and how long they stand; `bytes()` ends the file. */
export function createGif(width, height, palette) {
  const out = [];
  const known = new Int16Array(1 << 24).fill(-1); // colour -> its place in the palette
  palette.forEach((colour, i) => (known[colour] = i));
  let before = null;
  const word = (value) => out.push(value & 255, (value >> 8) & 255);
  out.push(...[..."GIF89a"].map((letter) => letter.charCodeAt(0)));
  word(width);
  word(height);
  out.push(0xf7, 0, 0);
  for (let i = 0; i < 256; i += 1) out.push(palette[i] & 255, (palette[i] >> 8) & 255, (palette[i] >> 16) & 255);
  out.push(0x21, 0xff, 11, ...[..."NETSCAPE2.0"].map((letter) => letter.charCodeAt(0)), 3, 1, 0, 0, 0);

  const nearest = (colour) => {
    const [r, g, b] = [colour & 255, (colour >> 8) & 255, colour >> 16];
    let [best, least] = [0, Infinity];
    for (let i = 0; i < palette.length; i += 1) {
      const [dr, dg, db] = [(palette[i] & 255) - r, ((palette[i] >> 8) & 255) - g, (palette[i] >> 16) - b];
      const far = 2 * dr * dr + 4 * dg * dg + 3 * db * db;
      if (far < least) [best, least] = [i, far];
    }
    known[colour] = best;
    return best;
  };

  return {
    add(pixels, hundredths) {
      const now = new Uint32Array(pixels.buffer, pixels.byteOffset, pixels.length >> 2);
      const box = before ? changedBox(before, now, width, height) : { x: 0, y: 0, w: width, h: height };
      const part = new Uint8Array(box.w * box.h);
      for (let y = 0; y < box.h; y += 1) {
        for (let x = 0; x < box.w; x += 1) {
          const at = (box.y + y) * width + box.x + x;
          const colour = now[at] & 0xffffff;
          part[y * box.w + x] = before && before[at] === now[at] ? SAME : known[colour] < 0 ? nearest(colour) : known[colour];
        }
      }
      out.push(0x21, 0xf9, 4, before ? 0x05 : 0x04);
      word(Math.max(2, Math.round(hundredths)));
      out.push(SAME, 0, 0x2c);
      for (const value of [box.x, box.y, box.w, box.h]) word(value);
      out.push(0);
      compressed(part, out);
      before = now;
    },
    bytes() {
      out.push(0x3b);
      return Uint8Array.from(out);
    },
  };
}

/** The smallest box that holds all that changed; one pixel where nothing did. */
function changedBox(before, now, width, height) {
  let [left, right, top, bottom] = [width, -1, height, -1];
  for (let y = 0; y < height; y += 1) {
    for (let x = 0, at = y * width; x < width; x += 1, at += 1) {
      if (before[at] === now[at]) continue;
      if (x < left) left = x;
      if (x > right) right = x;
      if (y < top) top = y;
      bottom = y;
    }
  }
  return right < 0 ? { x: 0, y: 0, w: 1, h: 1 } : { x: left, y: top, w: right - left + 1, h: bottom - top + 1 };
}

/** LZW as GIF has it, in blocks of at most 255 bytes. */
function compressed(indices, out) {
  const [clear, end] = [256, 257];
  let block = [];
  let [bits, held] = [0, 0];
  const byte = (value) => {
    block.push(value);
    if (block.length === 255) flush();
  };
  const flush = () => {
    if (block.length) {
      out.push(block.length);
      for (const value of block) out.push(value);
    }
    block = [];
  };
  let [size, next] = [9, 258];
  let codes = new Map();
  const emit = (code) => {
    bits |= code << held;
    held += size;
    while (held >= 8) {
      byte(bits & 255);
      bits >>>= 8;
      held -= 8;
    }
  };
  out.push(8);
  emit(clear);
  let prefix = indices[0];
  for (let i = 1; i < indices.length; i += 1) {
    const key = (prefix << 8) | indices[i];
    const code = codes.get(key);
    if (code !== undefined) {
      prefix = code;
      continue;
    }
    emit(prefix);
    if (next < 4096) {
      codes.set(key, next);
      if (next === 1 << size && size < 12) size += 1;
      next += 1;
    } else {
      emit(clear);
      [size, next, codes] = [9, 258, new Map()];
    }
    prefix = indices[i];
  }
  emit(prefix);
  emit(end);
  if (held) byte(bits & 255);
  flush();
  out.push(0);
}
