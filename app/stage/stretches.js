/**
 * One memory, slot by slot, in which every text has a single stretch: used, still to be used, never to be used.
 */
import { draw, make } from "./dom.js";
import { frameAt, hueOf, letterOf } from "./owners.js";

const CELL_LEAST = 10;
const CELL_MOST = 18;
const CELL_TALL = 24;
const LINE_GAP = 9;

export function stretches(host, spec, context) {
  const { store } = context;
  const picture = draw("svg", { role: "img", class: "blocks stretches" });
  const legend = make(
    "div",
    { class: "legend" },
    make("span", { class: "key fill-query" }, "holds a word"),
    make("span", { class: "key stretch-later" }, "kept for words still to come"),
    make("span", { class: "key state-evicted" }, "kept, never used"),
    make("span", { class: "key stretch-free" }, "free"),
  );
  host.append(picture, context.bare ? "" : legend);
  let step = 0;
  let key = "";
  let now = null;

  const read = () => {
    const rows = frameAt(store, spec.tensor, step);
    const slots = store.of(spec.slots)?.scalarAt(step);
    if (!rows || !slots) return null;
    const families = frameAt(store, spec.families, step)?.[0] || [];
    const states = frameAt(store, spec.states, step)?.[0] || [];
    const held = rows.filter(([, length]) => length).map(([start, length, tokens, last, owner]) => ({ start, length, tokens, last, owner, name: letterOf(families, owner) }));
    return { slots, held, waiting: outside(states, held).map((owner) => letterOf(families, owner)) };
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
    const head = context.bare ? 2 : 16;
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
    const height = head + lines * (CELL_TALL + LINE_GAP) + (context.bare ? 0 : 14);
    if (!context.bare) nodes.push(draw("text", { x: 0, y: height - 5, class: "routes-head" }, now.waiting.length ? `outside, with no stretch long enough: ${now.waiting.join(", ")}` : "nobody waits"));
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.style.height = `${height}px`;
    picture.replaceChildren(...nodes);
    picture.setAttribute("aria-label", `${spec.title}, ${now.slots} slots. ${now.held.map(stretchWords).join("; ") || "nothing is held"}. Waiting: ${now.waiting.join(", ") || "nobody"}`);
    geometry = { cell, across, head };
  };

  let geometry = null;
  const stretchWords = ({ name, start, length, tokens, last }) =>
    `${name}: slots ${start} to ${start + length - 1}, ${tokens} hold a word, ${last - tokens} will, ${length - last} never`;

  const redraw = () => {
    const wanted = `${step} ${host.clientWidth} ${context.theme} ${store.of(spec.tensor)?.version}`;
    if (wanted === key && now) return true;
    now = read();
    if (!now || !host.clientWidth) return false;
    key = wanted;
    paint();
    return true;
  };

  picture.addEventListener("pointermove", (event) => {
    if (!now || !geometry) return;
    const box = picture.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / geometry.cell);
    const line = Math.floor((event.clientY - box.top - geometry.head) / (CELL_TALL + LINE_GAP));
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
