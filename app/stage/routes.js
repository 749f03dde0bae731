/**
 * Who is sent to whom: two rows of nodes and lines between them, as thick as their weight. Lines that end elsewhere
 * after a step glide there; with reduced motion they are simply there.
 */
import { draw, make } from "./dom.js";
import { within } from "./glass.js";
import { format, short, visible } from "./text.js";

const ROW = 24;
const TOP = 26;
const GLIDE = 260; // milliseconds
const LEAST = 0.004; // a weight that draws no line

export function routes(host, spec, context) {
  const { store } = context;
  const wires = draw("g", { class: "routes-wires" });
  const nodes = draw("g", { class: "routes-nodes" });
  const picture = draw("svg", { role: "img", class: "routes" }, wires, nodes);
  const list = make("div", { class: "routes-focus", role: "group", tabindex: 0, "aria-label": `${spec.left}s` }, picture);
  host.append(list);
  const lines = new Map(); // "from to" -> {element, ends}
  let layout = null;
  let step = 0;
  let chosen = -1;
  let key = "";
  let frame = 0;

  const still = () => context.bare || matchMedia("(prefers-reduced-motion: reduce)").matches;

  /** {froms: [{label, weights: [[to, weight]]}], count}: what is to be drawn at the step. */
  const read = () => {
    const now = store.at(spec.tensor, step);
    if (!now) return null;
    const { track, r } = now;
    const about = track.row(r);
    const grows = Boolean(track.about.grows);
    const whole = track.axes.length === (grows ? 0 : 1);
    const load = store.newest(spec.loads, step);
    const rows = grows ? Math.min(spec.newest, r + 1) : about.shape[0];
    const first = grows ? r + 1 - rows : 0;
    const width = whole ? 1 : about.width;
    const given = typeof spec.count === "number" ? spec.count : store.newest(spec.count, step)?.[0];
    const froms = Array.from({ length: rows }, (_, i) => {
      const values = Array.from({ length: width }, (_, j) => (grows ? track.value(first + i, j) : track.value(r, i * width + j)));
      const weights = whole ? [[Math.round(values[0]), 1]] : values.map((v, j) => [j, v]).filter(([, v]) => v > LEAST);
      return { label: leftLabel(first + i), weights, at: grows ? { [track.about.grows]: first + i } : { [track.axes[0]]: i } };
    });
    const reached = Math.max(0, ...froms.flatMap(({ weights }) => weights.map(([to]) => to + 1)));
    const count = given ?? (whole ? Math.max(spec.right_labels.length, reached, load ? load.length : 0) : width);
    return { froms, count, load };
  };

  const leftLabel = (i) => {
    if (spec.left_labels === "tokens") return visible(store.pieces[i]) || String(i);
    return spec.left_labels[i] ?? String(i);
  };

  const place = ({ froms, count }) => {
    const width = host.clientWidth || 320;
    const tall = Math.max(froms.length, count) * ROW;
    const y = (i, n) => TOP + (tall * (i + 0.5)) / n;
    const room = context.bare ? 8 : Math.min(120, width * 0.24);
    const right = spec.loads && !context.bare ? width - Math.min(190, width * 0.42) : width - room;
    return { width, height: tall + TOP + 6, left: room, right, from: (i) => y(i, froms.length), to: (j) => y(j, count) };
  };

  const curve = ([a, b], { left, right }) => {
    const bend = (right - left) * 0.45;
    return `M${left + 7} ${a} C${left + 7 + bend} ${a} ${right - 7 - bend} ${b} ${right - 7} ${b}`;
  };

  const wire = (data) => {
    const wanted = new Map();
    data.froms.forEach(({ weights }, i) => weights.forEach(([to, weight], n) => wanted.set(`${i} ${n}`, { i, to, weight })));
    for (const [name, { element }] of lines) {
      if (!wanted.has(name)) {
        element.remove();
        lines.delete(name);
      }
    }
    for (const [name, { i, to, weight }] of wanted) {
      const ends = [layout.from(i), layout.to(to)];
      const known = lines.get(name);
      const entry = known || { element: draw("path", { fill: "none" }), ends, from: ends, to: ends };
      if (!known) {
        wires.append(entry.element);
        lines.set(name, entry);
      }
      entry.element.setAttribute("class", `routes-wire${chosen >= 0 && chosen !== i ? " aside" : ""}`);
      entry.element.style.stroke = context.colours.role(spec.left_colour);
      entry.element.style.strokeWidth = `${1 + 5 * Math.min(1, Math.max(0, weight))}px`;
      entry.element.style.opacity = String(0.25 + 0.65 * Math.min(1, weight));
      entry.from = known && !still() ? entry.ends : ends;
      entry.to = ends;
    }
    glide();
  };

  /** Bring every line from where it is to where it goes. */
  const glide = () => {
    cancelAnimationFrame(frame);
    const began = performance.now();
    const go = (now) => {
      const t = still() ? 1 : Math.min(1, Math.max(0, (now - began) / GLIDE));
      const eased = t * (2 - t);
      for (const entry of lines.values()) {
        entry.ends = entry.from.map((a, k) => a + (entry.to[k] - a) * eased);
        entry.element.setAttribute("d", curve(entry.ends, layout));
      }
      if (t < 1) frame = requestAnimationFrame(go);
    };
    go(began);
  };

  const node = (x, y, colour, text, side) => [
    draw("circle", { cx: x, cy: y, r: 6, class: `fill-${colour} routes-node` }),
    context.bare ? null : draw("text", { x: side < 0 ? x - 12 : x + 12, y, class: "routes-label", "text-anchor": side < 0 ? "end" : "start", "dominant-baseline": "central" }, text),
  ];

  const furnish = (data) => {
    const { left, right, width } = layout;
    const heads = context.bare ? [] : [
      draw("text", { x: left, y: 10, class: `routes-head ink-${spec.left_colour}`, "text-anchor": "middle" }, `${data.froms.length} ${plural(spec.left, data.froms.length)}`),
      draw("text", { x: right, y: 10, class: `routes-head ink-${spec.right_colour}`, "text-anchor": "middle" }, `${data.count} ${plural(spec.right, data.count)}`),
    ];
    const most = data.load ? Math.max(1e-9, ...data.load) : 1;
    const bars = (data.load || []).slice(0, context.bare ? 0 : data.count).flatMap((value, j) => {
      const start = right + 14 + (spec.right_labels.length ? 42 : 22);
      const room = Math.max(10, width - start - 50);
      return [
        draw("rect", { x: start, y: layout.to(j) - 5, height: 10, width: Math.max(1, (room * value) / most), rx: 2, class: `fill-${spec.right_colour}` }),
        draw("text", { x: start + (room * value) / most + 5, y: layout.to(j), class: "routes-label", "dominant-baseline": "central" }, format(value, spec.loads_format)),
      ];
    });
    const froms = data.froms.flatMap(({ label }, i) => node(left, layout.from(i), spec.left_colour, label, -1));
    const tos = Array.from({ length: data.count }, (_, j) => node(right, layout.to(j), spec.right_colour, spec.right_labels[j] ?? String(j), 1)).flat();
    nodes.replaceChildren(...[...heads, ...froms, ...tos, ...bars].filter(Boolean));
  };

  const sentence = ({ label, weights }) =>
    `${spec.left} ${label}: ${weights.map(([to, weight]) => `${spec.right} ${spec.right_labels[to] ?? to}${weight === 1 ? "" : ` ${short(weight)}`}`).join(", ") || "nobody"}`;

  let data = null;
  const redraw = () => {
    data = read();
    if (!data || !host.clientWidth) return false;
    const wanted = `${step} ${host.clientWidth} ${chosen} ${context.theme} ${store.of(spec.tensor).version}`;
    if (wanted === key) return true;
    key = wanted;
    layout = place(data);
    picture.setAttribute("viewBox", `0 0 ${layout.width} ${layout.height}`);
    picture.style.height = `${layout.height}px`;
    wire(data);
    furnish(data);
    picture.setAttribute("aria-label", `${spec.title}. ${data.froms.slice(0, 12).map(sentence).join("; ")}`);
    return true;
  };

  const choose = (i) => {
    chosen = i;
    redraw();
    if (i >= 0 && data) context.announce(sentence(data.froms[i]));
  };

  const under = (event) => {
    if (!layout || !data) return -1;
    const y = within(event, picture).y;
    const i = data.froms.findIndex((_, n) => Math.abs(layout.from(n) - y) < ROW / 2);
    return i;
  };

  list.addEventListener("pointermove", (event) => {
    const i = under(event);
    if (i !== chosen) choose(i);
    if (i >= 0) context.tip.near(event, [sentence(data.froms[i])]);
    else context.tip.hide();
  });
  list.addEventListener("pointerleave", () => {
    context.tip.hide();
    choose(-1);
  });
  list.addEventListener("blur", () => choose(-1));
  list.addEventListener("click", (event) => {
    const i = under(event);
    if (i >= 0 && spec.cell) context.open(data.froms[i].at);
  });
  list.addEventListener("keydown", (event) => {
    if (!data) return;
    const moves = { ArrowDown: 1, ArrowUp: -1 };
    if (event.key in moves) choose(Math.max(0, Math.min(data.froms.length - 1, chosen + moves[event.key])));
    else if (event.key === "Enter" && chosen >= 0 && spec.cell) context.open(data.froms[chosen].at);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  return {
    draw(now) {
      step = now;
      return redraw();
    },
    resize() {
      key = "";
      redraw();
    },
    dispose() {
      cancelAnimationFrame(frame);
      list.remove();
    },
    table: () => ({
      columns: [spec.left, spec.right],
      rows: (data ? data.froms : []).map(({ label, weights }) => [label, weights.map(([to, weight]) => `${spec.right_labels[to] ?? to}${weight === 1 ? "" : ` (${short(weight)})`}`).join(", ")]),
    }),
  };
}

function plural(word, count) {
  return count === 1 ? word : `${word}s`;
}
