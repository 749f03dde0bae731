/**
 * A matrix swept tile by tile. On the left only the tile at work is there, what is done is a faint memory of ours; on the
 * right the whole matrix, which keeps all. Everything follows from the tiles that the engine says it has computed.
 */
import { css } from "./colours.js";
import { createCursor } from "./cursor.js";
import { make, say, sized } from "./dom.js";
import { within } from "./glass.js";
import { bytes, short } from "./text.js";

const SIDE_MOST = 400; // pixels of a matrix's side
const STRIP = 8; // thickness of the strips that stand for Q, K, V and O
const STRIP_GAP = 3;
const NAMES = 15; // room for the letters
const APART = 34; // between the two matrices
const GHOST = 0.38; // how faint is what was computed and forgotten
const HATCH = 6;

export function sweepTiles(host, spec, context) {
  const { store } = context;
  const said = make("div", { class: "tiles-said" });
  const canvas = make("canvas", { role: "application", tabindex: context.bare ? null : 0 });
  const wrap = make("div", { class: "canvas-wrap" }, canvas);
  const ways = [spec.moved ? tileGauges(spec, "tiles") : null, spec.moved && spec.mirror ? tileGauges(spec, "whole") : null].filter(Boolean);
  const foot = make("div", { class: "tiles-ways" }, ways.map((way) => way.node));
  host.append(...(context.bare ? [wrap] : [said, wrap, foot]));
  const sheets = [document.createElement("canvas"), document.createElement("canvas")];
  let step = 0;
  let key = "";
  let plan = null;

  const scalar = (tensor) => (tensor && store.of(tensor) ? store.of(tensor).scalarAt(step) : null);

  /** The tiles so far, in order; the last is the one at work. */
  const read = () => {
    const track = store.of(spec.tile);
    const matrix = store.of(spec.tensor);
    if (!track || !matrix) return null;
    const scores = store.of(spec.scores);
    const tiles = Array.from({ length: track.countAt(step) }, (_, r) => {
      const [top, bottom, left, right] = [0, 1, 2, 3].map((i) => track.value(r, i));
      const n = scores ? scores.countAt(track.at[r]) - 1 : -1;
      return { r, top, bottom, left, right, at: track.at[r], scores: n >= 0 && scores.at[n] === track.at[r] ? n : -1 };
    });
    const rows = spec.mirror ? matrix.extent(matrix.axes[0]) : Math.max(...tiles.map((t) => t.bottom), 1);
    const columns = matrix.extent(matrix.axes[1]);
    return { tiles, rows, columns: spec.mirror ? columns : widest(track), track, matrix, now: tiles[tiles.length - 1] };
  };

  const widest = (track) => Array.from({ length: track.count }, (_, r) => track.value(r, 3)).reduce((a, b) => Math.max(a, b), 1);

  const lay = (seen) => {
    const width = host.clientWidth;
    const bare = context.bare;
    const head = bare ? 1 : NAMES + 2 * (STRIP + STRIP_GAP);
    const left = bare ? 1 : NAMES + STRIP + STRIP_GAP;
    const right = bare ? 1 : STRIP + STRIP_GAP + 2;
    const apart = bare ? 10 : Math.min(APART, width * 0.04);
    const room = spec.mirror ? (width - apart) / 2 - left - right : width - left - right;
    const tallest = bare ? (context.height || 170) - 4 : SIDE_MOST;
    const scale = Math.min(room / seen.columns, tallest / seen.rows);
    const side = { w: scale * seen.columns, h: scale * seen.rows };
    const tall = spec.mirror ? side.h : Math.max(side.h, Math.min(120, side.w / 3));
    const cell = { w: side.w / seen.columns, h: tall / seen.rows };
    const halfway = spec.mirror ? (width + apart) / 2 : 0;
    const boxes = [{ x: left, y: head }, ...(spec.mirror ? [{ x: halfway + left, y: head }] : [])];
    return { width, height: head + tall + (bare ? 3 : NAMES + 3), boxes, w: side.w, h: tall, cw: cell.w, ch: cell.h };
  };

  const redraw = () => {
    const seen = read();
    if (!seen || !seen.now || !host.clientWidth) return false;
    const row = spec.row ? context.knobs[spec.row.knob] : -1;
    const wanted = `${step} ${host.clientWidth} ${context.theme} ${row} ${seen.track.version} ${store.of(spec.total)?.version}`;
    if (wanted === key) return true;
    key = wanted;
    plan = { ...lay(seen), seen, row: Math.min(row, seen.rows - 1) };
    paint();
    tell();
    return true;
  };

  const paint = () => {
    const { seen, width, height, boxes } = plan;
    const pen = sized(canvas, width, height);
    pen.clearRect(0, 0, width, height);
    fillSheets(seen);
    boxes.forEach((box, n) => paintBox(pen, box, n));
    canvas.dataset.boxes = JSON.stringify(boxes.map((box) => ({ ...box, cw: plan.cw, ch: plan.ch })));
  };

  const place = (box, tile) => [box.x + tile.left * plan.cw, box.y + tile.top * plan.ch, (tile.right - tile.left) * plan.cw, (tile.bottom - tile.top) * plan.ch];

  const paintBox = (pen, box, n) => {
    const { seen, cw, ch, w, h } = plan;
    const { role } = context.colours;
    const own = n === 0;
    pen.fillStyle = role("sunk");
    pen.fillRect(box.x, box.y, w, h);
    for (const tile of seen.tiles) {
      const [x, y, tw, th] = place(box, tile);
      const current = tile === seen.now;
      if (own && tile.scores < 0) {
        hatchTile(pen, [x, y, tw, th], role("hatch"));
        continue;
      }
      pen.globalAlpha = own && !current ? GHOST : 1;
      pen.imageSmoothingEnabled = cw < 1;
      pen.drawImage(sheets[n], tile.left, tile.top, tile.right - tile.left, tile.bottom - tile.top, x, y, tw, th);
      pen.globalAlpha = 1;
    }
    pen.strokeStyle = role("line");
    pen.lineWidth = 1;
    if (own) for (const tile of seen.tiles) pen.strokeRect(...place(box, tile));
    pen.strokeRect(box.x - 0.5, box.y - 0.5, w + 1, h + 1);
    if (!context.bare && plan.row >= 0 && spec.row) {
      pen.fillStyle = role("ink");
      pen.globalAlpha = 0.75;
      pen.fillRect(box.x, box.y + (plan.row + 0.5) * ch - 0.5, w, 1);
      pen.globalAlpha = 1;
      pen.font = `11px ${context.fonts.text}`;
      pen.textAlign = "right";
      pen.textBaseline = "bottom";
      if (w > 180) pen.fillText(`row ${plan.row}`, box.x + w - 4, box.y + (plan.row + 0.5) * ch - 2);
    }
    if (own) {
      pen.strokeStyle = seen.now.scores < 0 ? role("alarm") : role("ink");
      pen.lineWidth = 2;
      pen.strokeRect(...place(box, seen.now));
    }
    if (!context.bare) strips(pen, box, own);
  };

  /** Q at the left, K and V above, O at the right: which part of each is in SRAM now. */
  const strips = (pen, box, own) => {
    const { seen, w, h, cw, ch } = plan;
    const { role } = context.colours;
    const { now } = seen;
    const idle = now.scores < 0;
    const bar = (colour, x, y, bw, bh, alpha) => {
      pen.fillStyle = role(colour);
      pen.globalAlpha = alpha;
      pen.fillRect(x, y, bw, bh);
      pen.globalAlpha = 1;
    };
    const rows = [box.y + now.top * ch, (now.bottom - now.top) * ch];
    const columns = [box.x + now.left * cw, (now.right - now.left) * cw];
    const lit = own && !idle ? 1 : own ? 0.22 : 0.5;
    const left = box.x - STRIP - STRIP_GAP;
    const right = box.x + w + STRIP_GAP;
    const above = [2, 1].map((k) => box.y - k * (STRIP + STRIP_GAP));
    bar("query", left, box.y, STRIP, h, own ? 0.22 : 0.5);
    for (const [i, colour] of ["key", "value"].entries()) bar(colour, box.x, above[i], w, STRIP, own ? 0.22 : 0.5);
    for (const block of blocksDone()) bar("recent", right, box.y + block.top * ch, STRIP, (block.bottom - block.top) * ch, block.whole ? 0.6 : 0.18);
    if (own) {
      bar("query", left, rows[0], STRIP, rows[1], lit);
      bar("key", columns[0], above[0], columns[1], STRIP, lit);
      bar("value", columns[0], above[1], columns[1], STRIP, lit);
      bar("recent", right, rows[0], STRIP, rows[1], lit);
    }
    pen.font = `600 11px ${context.fonts.mono}`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    const letter = (text, colour, x, y) => {
      pen.fillStyle = context.colours.ink(colour);
      pen.fillText(text, x, y);
    };
    letter("Q", "query", left + STRIP / 2, box.y + h + 9);
    letter("K", "key", box.x - 8, above[0] + STRIP / 2);
    letter("V", "value", box.x - 8, above[1] + STRIP / 2);
    letter("O", "recent", right + STRIP / 2, box.y + h + 9);
    pen.textAlign = "left";
    pen.fillStyle = role("muted");
    pen.font = `11.5px ${context.fonts.text}`;
    const title = own ? (spec.mirror ? "in tiles: one at a time" : "") : "standard: all of it is written";
    pen.fillText(title, box.x, NAMES / 2 - 1, w);
  };

  /** Blocks of queries with how far they are: begun, or done with every key. */
  const blocksDone = () => {
    const found = new Map();
    for (const tile of plan.seen.tiles) {
      const block = found.get(tile.top) || { top: tile.top, bottom: tile.bottom, keys: 0 };
      block.keys += tile.right - tile.left;
      block.whole = block.keys >= plan.seen.columns;
      found.set(tile.top, block);
    }
    return [...found.values()];
  };

  /** A pixel a cell: the share that each cell had when its tile was here, as the row stands now; and the whole matrix. */
  const fillSheets = ({ tiles, rows, columns, matrix }) => {
    const scores = store.of(spec.scores);
    const table = context.colours.scale("attention");
    const [largest, total] = [store.of(spec.largest), store.of(spec.total)];
    const last = largest ? largest.countAt(step) - 1 : -1;
    const causal = Boolean(scalar(spec.causal));
    const own = new ImageData(columns, rows);
    const ownPixels = new Uint32Array(own.data.buffer);
    for (const tile of tiles.filter((t) => t.scores >= 0 && last >= 0)) {
      const stride = scores.row(tile.scores).shape[1];
      for (let i = tile.top; i < tile.bottom; i += 1) {
        const [m, l] = [largest.value(last, i), total.value(last, i)];
        for (let j = tile.left; j < tile.right; j += 1) {
          const s = scores.value(tile.scores, (i - tile.top) * stride + j - tile.left);
          const share = causal && j > i ? 0 : Math.exp(s - m) / l;
          ownPixels[i * columns + j] = table[Math.round(255 * Math.sqrt(Math.min(1, share || 0)))];
        }
      }
    }
    put(sheets[0], own);
    if (!spec.mirror) return;
    const whole = new ImageData(columns, rows);
    const wholePixels = new Uint32Array(whole.data.buffer);
    for (let n = 0; n < rows * columns; n += 1) wholePixels[n] = table[Math.round(255 * Math.sqrt(matrix.value(0, n)))];
    put(sheets[1], whole);
  };

  const tell = () => {
    const { now, tiles } = plan.seen;
    const where = `queries ${now.top} to ${now.bottom - 1}, keys ${now.left} to ${now.right - 1}`;
    const what = now.scores < 0 ? "all of these keys come later: nothing to compute" : "computed, then forgotten";
    const text = `Tile ${tiles.length}: ${where}: ${what}.`;
    say(said, text);
    const figures = { held: scalar(spec.held), room: scalar(spec.room), moved: scalar(spec.moved), whole: scalar(spec.whole_moved), peak: scalar(spec.peak), wholePeak: scalar(spec.whole_peak) };
    ways.forEach((way) => way.update(figures, { ...before(), now, width: store.of(spec.width)?.row(0).width || 0 }));
    const counted = figures.moved === null ? "" : ` Moved so far: ${bytes(figures.moved)} in tiles, ${bytes(figures.whole)} the standard way.`;
    canvas.setAttribute("aria-label", `${spec.title}. ${text} ${tiles.filter((t) => t.scores < 0).length} skipped so far.${counted} Arrow keys read cells, Enter opens one.`);
  };

  /** What this tile alone moved. */
  const before = () => {
    const step0 = plan.seen.now.at;
    const delta = (tensor) => {
      const track = tensor ? store.of(tensor) : null;
      if (!track) return null;
      const r = track.countAt(step0) - 1;
      return track.scalar(r) - (r > 0 ? track.scalar(r - 1) : 0);
    };
    return { movedNow: delta(spec.moved), wholeNow: delta(spec.whole_moved), most: mostOf(spec.whole_moved), current: plan.seen.now.at === step };
  };

  const mostOf = (tensor) => (tensor && store.of(tensor) ? store.of(tensor).range()[1] : 1);

  const tileOf = ({ i, j }) => plan.seen.tiles.find((t) => i >= t.top && i < t.bottom && j >= t.left && j < t.right);

  const grid = {
    find(x, y) {
      if (!plan) return null;
      for (const [side, box] of plan.boxes.entries()) {
        const [i, j] = [Math.floor((y - box.y) / plan.ch), Math.floor((x - box.x) / plan.cw)];
        if (i >= 0 && j >= 0 && i < plan.seen.rows && j < plan.seen.columns) return { side, i, j };
      }
      return null;
    },
    box({ side, i, j }) {
      const box = plan && plan.boxes[side];
      return box && i < plan.seen.rows && j < plan.seen.columns ? { x: box.x + j * plan.cw, y: box.y + i * plan.ch, width: Math.max(3, plan.cw), height: Math.max(3, plan.ch) } : null;
    },
    move(cell, down, right) {
      if (!plan) return null;
      if (!cell) return { side: 0, i: plan.seen.now.top, j: plan.seen.now.left };
      const next = { side: cell.side, i: cell.i + down, j: cell.j + right };
      return next.i >= 0 && next.j >= 0 && next.i < plan.seen.rows && next.j < plan.seen.columns ? next : cell;
    },
    lines(cell) {
      const place = `query ${cell.i} · key ${cell.j}`;
      const tile = tileOf(cell);
      if (!tile) return ["not reached yet", place];
      const mine = cell.side === 0;
      if (mine && tile.scores < 0) return ["skipped", place, "its whole tile lies in the future"];
      if (scalar(spec.causal) && cell.j > cell.i) return [mine ? "masked: −∞" : "0, written all the same", place];
      if (!mine) return [`P ≈ ${short(plan.seen.matrix.value(0, cell.i * plan.seen.columns + cell.j))}`, place, "lies in HBM"];
      const scores = store.of(spec.scores);
      const s = scores.value(tile.scores, (cell.i - tile.top) * scores.row(tile.scores).shape[1] + cell.j - tile.left);
      const [m, l] = [spec.largest, spec.total].map((tensor) => store.of(tensor).value(store.of(tensor).countAt(step) - 1, cell.i));
      return [`share so far ≈ ${short(Math.exp(s - m) / l)}`, place, `score ≈ ${short(s)}, m ${short(m)}, l ${short(l)}`, tile === plan.seen.now ? "in SRAM now" : `stored nowhere: tile ${tile.r + 1} is gone`];
    },
    open(cell) {
      if (spec.cell && tileOf(cell)) context.open({ [plan.seen.matrix.axes[0]]: cell.i, [plan.seen.matrix.axes[1]]: cell.j });
    },
  };
  const cursor = createCursor(wrap, canvas, context.tip, grid, context.announce);

  canvas.addEventListener("click", (event) => {
    const { x, y } = within(event, canvas);
    if (!plan || !spec.row || grid.find(x, y) || x > plan.boxes[0].x) return;
    const i = Math.floor((y - plan.boxes[0].y) / plan.ch);
    if (i >= 0 && i < plan.seen.rows) context.turn(spec.row.knob, i);
  });

  return {
    draw(at) {
      step = at;
      const drawn = redraw();
      cursor.refresh();
      return drawn;
    },
    resize() {
      key = "";
      redraw();
    },
    dispose() {
      for (const node of [said, wrap, foot]) node.remove();
    },
    table() {
      const columns = ["tile", "queries", "keys", "state"];
      const rows = plan ? plan.seen.tiles.map((t) => [t.r + 1, `${t.top}–${t.bottom - 1}`, `${t.left}–${t.right - 1}`, t.scores < 0 ? "skipped" : t === plan.seen.now ? "in SRAM" : "done, forgotten"]) : [];
      return { columns, rows };
    },
  };
}

function put(sheet, image) {
  sheet.width = image.width;
  sheet.height = image.height;
  sheet.getContext("2d").putImageData(image, 0, 0);
}

function hatchTile(pen, [x, y, w, h], colour) {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, w, h);
  pen.clip();
  pen.strokeStyle = colour;
  pen.lineWidth = 1;
  pen.beginPath();
  for (let at = -h; at < w; at += HATCH) {
    pen.moveTo(x + at, y + h);
    pen.lineTo(x + at + h, y);
  }
  pen.stroke();
  pen.restore();
}

/** The memories of one way: what is in SRAM, what went over the wire, what HBM has to hold. */
function tileGauges(spec, kind) {
  const own = kind === "tiles";
  const rows = {};
  const row = (name, label, segments) => {
    const value = make("span", { class: "tiles-value" });
    const parts = segments.map((colour) => make("span", { class: `tiles-part fill-${colour}` }));
    const bar = make("span", { class: "tiles-bar" }, parts);
    rows[name] = { value, parts, bar };
    return make("div", { class: "tiles-row" }, make("span", { class: "tiles-label" }, label), bar, value);
  };
  const colour = own ? "recent" : "alarm";
  const node = make(
    "div",
    { class: "tiles-way" },
    own ? make("div", { class: "tiles-box" }, make("div", { class: "tiles-name" }, "SRAM"), row("held", "in it now", ["query", "key", "value", "recent", "sink"])) : null,
    make("div", { class: "tiles-box" }, make("div", { class: "tiles-name" }, own ? "HBM" : "HBM, the standard way"), row("moved", "moved", [colour]), row("peak", "holds at most", [colour])),
  );
  const grow = ({ parts }, shares) => parts.forEach((part, i) => part.style.setProperty("width", `${100 * Math.max(0, Math.min(1, shares[i] || 0))}%`));

  const update = (figures, { now, width, movedNow, wholeNow, most, current }) => {
    if (own) {
      const [tall, wide] = [now.bottom - now.top, now.right - now.left];
      const values = [tall * width, wide * width, wide * width, tall * width, tall * wide + 2 * tall];
      const each = figures.held / values.reduce((a, b) => a + b, 0);
      const room = Math.max(figures.room, figures.held);
      grow(rows.held, values.map((count) => (count * each) / room));
      say(rows.held.value, figures.held ? `${bytes(figures.held)} of ${bytes(figures.room)}` : `idle, of ${bytes(figures.room)}`);
      rows.held.bar.title = `Q ${bytes(values[0] * each)}, K and V ${bytes(values[1] * each)} each, O ${bytes(values[3] * each)}, scores with m and l ${bytes(values[4] * each)}`;
    }
    const [total, fresh] = own ? [figures.moved, movedNow] : [figures.whole, wholeNow];
    grow(rows.moved, [total / Math.max(most, figures.moved)]);
    say(rows.moved.value, `${bytes(total)}${fresh !== null && current ? `, ${bytes(fresh)} now` : ""}`);
    const peak = own ? figures.peak : figures.wholePeak;
    grow(rows.peak, [peak / Math.max(figures.peak, figures.wholePeak)]);
    say(rows.peak.value, bytes(peak));
  };
  return { node, update };
}
