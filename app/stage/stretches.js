/**
 * One memory, slot by slot: every text in a single stretch, used, still to be used, never to be used; and below it the
 * same texts in blocks, where only the last block of each has empty slots.
 */
import { draw, make } from "./dom.js";
import { within } from "./glass.js";
import { hueOf, letterOf } from "./owners.js";

const CELL_LEAST = 10;
const CELL_MOST = 18;
const CELL_TALL = 24;
const LINE_GAP = 9;
const BAND_HEAD = 18;
const BAND_FOOT = 20;

export function stretches(host, spec, context) {
  const { store } = context;
  const picture = draw("svg", { role: "img", class: "blocks stretches" });
  const legend = make(
    "div",
    { class: "legend" },
    make("span", { class: "key fill-query" }, make("span", { class: "key-text" }, "holds a word")),
    make("span", { class: "key stretch-later" }, "kept for words still to come"),
    make("span", { class: "key state-evicted" }, "kept, and empty"),
    make("span", { class: "key stretch-free" }, "free"),
  );
  host.append(picture, context.bare ? "" : legend);
  let step = 0;
  let key = "";
  let now = null;

  const read = () => {
    const rows = store.frame(spec.tensor, step);
    const slots = store.of(spec.slots)?.scalarAt(step);
    if (!rows || !slots) return null;
    const families = store.frame(spec.families, step)?.[0] || [];
    const states = store.frame(spec.states, step)?.[0] || [];
    const held = rows.filter(([, length]) => length).map(([start, length, tokens, last, owner]) => ({ start, length, tokens, last, owner, name: letterOf(families, owner) }));
    const name = (owner) => letterOf(families, owner);
    const waits = states.flatMap((state, owner) => (state === 1 || state === 3 ? [name(owner)] : []));
    return { slots, held, waiting: outside(states, held).map(name), waits, paged: inBlocks(name) };
  };

  /** Slot by slot, the texts whose block it is in, and whether it holds a word; null where no tables are given. */
  const inBlocks = (name) => {
    const tables = spec.tables ? store.frame(spec.tables, step) : null;
    const codes = spec.codes ? store.frame(spec.codes, step) : null;
    if (!tables || !codes) return null;
    const owners = codes.map((_, b) => tables.flatMap((row, i) => (row.includes(b) ? [i] : [])));
    return { size: codes[0].length, name, slots: codes.flatMap((row, b) => row.map((code) => ({ owners: owners[b], held: code === 1 }))) };
  };

  /** Those who have arrived and never had a stretch. */
  const outside = (states, held) => {
    const track = store.of(spec.tensor);
    const seen = new Set(held.map(({ owner }) => owner));
    for (let at = 0; at < track.countAt(step); at += 1) {
      const { shape } = track.row(at);
      for (let i = 0; i < shape[0]; i += 1) if (track.value(at, i * shape[1] + 1)) seen.add(track.value(at, i * shape[1] + 4));
    }
    return states.flatMap((state, owner) => (state && !seen.has(owner) ? [owner] : []));
  };

  const paint = () => {
    const width = host.clientWidth;
    const most = Math.max(8, Math.floor(width / CELL_LEAST / 8) * 8);
    const lines = Math.ceil(now.slots / most);
    const across = Math.ceil(now.slots / lines / 4) * 4;
    const cell = Math.min(CELL_MOST, width / across);
    const head = context.bare ? 2 : BAND_HEAD;
    const band = lines * (CELL_TALL + LINE_GAP) + (context.bare ? 4 : BAND_HEAD + BAND_FOOT);
    const place = (n) => [(n % across) * cell, head + Math.floor(n / across) * (CELL_TALL + LINE_GAP)];
    const nodes = [];
    const span = (from, to, attributes) => {
      for (let n = from; n < to; ) {
        const end = Math.min(to, (Math.floor(n / across) + 1) * across);
        const [x, y] = place(n);
        nodes.push(draw("rect", { x, y, width: (end - n) * cell, height: CELL_TALL, ...attributes }));
        n = end;
      }
    };
    span(0, now.slots, { class: "stretch-ground" });
    for (const { start, length, tokens, last, owner } of now.held) {
      const colour = context.colours.role(hueOf(owner));
      span(start, start + tokens, { style: { fill: colour } });
      span(start + tokens, start + last, { class: "stretch-come", style: { fill: colour } });
      span(start + last, start + length, { class: "stretch-never", style: { fill: colour } });
      let strokes = "";
      for (let n = start + last; n < start + length; n += 1) {
        const [x, y] = place(n);
        strokes += `M${x + 1} ${y + CELL_TALL - 3} L${x + cell - 1} ${y + 3}`;
      }
      if (strokes) nodes.push(draw("path", { d: strokes, class: "stretch-hatch" }));
    }
    let cuts = "";
    for (let n = 0; n < now.slots; n += 1) {
      const [x, y] = place(n);
      if (n % across) cuts += `M${x} ${y}V${y + CELL_TALL}`;
    }
    nodes.push(draw("path", { d: cuts, class: "stretch-cuts" }));
    for (const { start, length, owner, name } of now.held) {
      span(start, start + length, { class: "stretch-edge", style: { stroke: context.colours.role(hueOf(owner)) } });
      const [x, y] = place(start);
      if (!context.bare) nodes.push(draw("text", { x: x + cell / 2 + 1, y: y + CELL_TALL / 2, class: "blocks-letter", "text-anchor": "middle", "dominant-baseline": "central" }, name));
    }
    const waiting = (names) => (names.length ? `outside: ${names.join(", ")}` : "nobody waits");
    const height = now.paged ? 2 * band : band;
    if (now.paged) nodes.push(draw("g", { transform: `translate(0 ${band})` }, bandOf({ cell, across, place })));
    if (!context.bare) {
      nodes.push(draw("text", { x: 0, y: 11, class: "routes-head" }, "one stretch for each text"));
      nodes.push(draw("text", { x: 0, y: band - 11, class: "routes-label" }, waiting(now.waiting)));
      if (now.paged) nodes.push(draw("text", { x: 0, y: band + 11, class: "routes-head" }, `in blocks of ${now.paged.size}`));
      if (now.paged) nodes.push(draw("text", { x: 0, y: height - 11, class: "routes-label" }, waiting(now.waits)));
    }
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.style.height = `${height}px`;
    picture.replaceChildren(...nodes);
    picture.setAttribute("aria-label", `${spec.title}, ${now.slots} slots. ${now.held.map(stretchWords).join("; ") || "nothing is held"}. Outside: ${now.waiting.join(", ") || "nobody"}${now.paged ? `; in blocks, ${now.waits.join(", ") || "nobody"}` : ""}`);
    geometry = { cell, across, head };
  };

  /** The same slots in blocks: in a shared one, each owner has a part of every slot. */
  const bandOf = ({ cell, across, place }) => {
    const { size, slots, name } = now.paged;
    const nodes = [];
    let strokes = "";
    let cuts = "";
    let edges = "";
    slots.forEach(({ owners, held }, n) => {
      const [x, y] = place(n);
      if (!owners.length) nodes.push(draw("rect", { x, y, width: cell, height: CELL_TALL, class: "stretch-ground" }));
      const part = CELL_TALL / Math.max(1, owners.length);
      owners.forEach((owner, k) => nodes.push(draw("rect", { x, y: y + k * part, width: cell, height: part, class: held ? null : "stretch-never", style: { fill: context.colours.role(hueOf(owner)) } })));
      if (owners.length && !held) strokes += `M${x + 1} ${y + CELL_TALL - 3} L${x + cell - 1} ${y + 3}`;
      if (n % across) cuts += `M${x} ${y}V${y + CELL_TALL}`;
      if (n % size === 0) edges += `M${x} ${y - 3}V${y + CELL_TALL + 3}`;
    });
    nodes.push(draw("path", { d: strokes, class: "stretch-hatch" }), draw("path", { d: cuts, class: "stretch-cuts" }), draw("path", { d: edges, class: "stretch-block" }));
    slots.forEach(({ owners }, n) => {
      if (context.bare || n % size || !owners.length) return;
      const [x, y] = place(n);
      const part = CELL_TALL / owners.length;
      owners.forEach((owner, k) => nodes.push(draw("text", { x: x + cell / 2 + 0.5, y: y + (k + 0.5) * part, class: `blocks-letter${owners.length > 1 ? " tiny" : ""}`, "text-anchor": "middle", "dominant-baseline": "central" }, name(owner))));
    });
    return nodes;
  };

  let geometry = null;
  const stretchWords = ({ name, start, length, tokens, last }) =>
    `${name}: slots ${start} to ${start + length - 1}, ${tokens} hold a word, ${last - tokens} will, ${length - last} never`;

  const redraw = () => {
    const wanted = `${step} ${host.clientWidth} ${context.theme} ${store.of(spec.tensor)?.version} ${store.of(spec.tables)?.version}`;
    if (wanted === key && now) return true;
    now = read();
    if (!now || !host.clientWidth) return false;
    key = wanted;
    paint();
    return true;
  };

  picture.addEventListener("pointermove", (event) => {
    if (!now || !geometry) return;
    const { x, y } = within(event, picture);
    const column = Math.floor(x / geometry.cell);
    const line = Math.floor((y - geometry.head) / (CELL_TALL + LINE_GAP));
    const n = line * geometry.across + column;
    const found = now.held.find(({ start, length }) => n >= start && n < start + length);
    if (found && column >= 0 && column < geometry.across) context.tip.near(event, [`slot ${n}`, stretchWords(found)]);
    else context.tip.hide();
  });
  picture.addEventListener("pointerleave", () => context.tip.hide());

  return {
    draw(at) {
      step = at;
      return redraw();
    },
    resize() {
      key = "";
      redraw();
    },
    dispose() {
      picture.remove();
      legend.remove();
    },
    table: () => ({
      columns: ["text", "first slot", "slots kept", "hold a word", "will", "never"],
      rows: (now ? now.held : []).map(({ name, start, length, tokens, last }) => [name, start, length, tokens, last - tokens, length - last]),
    }),
  };
}
