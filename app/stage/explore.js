/**
 * The page that looks at any tensor of a run: which one, which of its axes run down and across, where the others are
 * held. The plots beside it are Bokeh's; they are told by the server what to show.
 */
import { palette } from "./colours.js";
import { fill, make, say, throttled } from "./dom.js";
import { createHeader } from "./header.js";
import { createNotices } from "./notices.js";
import { createPulse } from "./pulse.js";
import { short } from "./text.js";
import { plain } from "./track.js";

const TOLD = ["paper", "panel", "ink", "muted", "line", "query", "key", "recent"];

export function explorePage({ root, model, places, theme }) {
  const about = model.get("explore");
  const send = (message) => model.send_msg(message);
  const notices = createNotices();
  let tensors = [];
  let chosen = { key: "", down: "", across: "", held: {} };
  let ready = false;

  const tell = throttled(() => send({ type: "choose", ...chosen }), 70);
  const choose = (change) => {
    chosen = { ...chosen, ...change };
    tell();
  };

  const state = make("p", { class: "explore-state", role: "status" }, "Waiting for the run …");
  const tensor = axisChoice("explore-tensor", "Tensor", () => choose({ key: tensor.input.value, down: "", across: "", held: {} }));
  const down = axisChoice("explore-down", "Down", () => choose({ down: down.input.value, ...(down.input.value === chosen.across ? { across: chosen.down } : {}) }));
  const across = axisChoice("explore-across", "Across", () => choose({ across: across.input.value, ...(across.input.value === chosen.down ? { down: chosen.across } : {}) }));
  const sliders = make("div", { class: "explore-sliders" });
  const meaning = make("p", { class: "explore-meaning" });
  const grid = make("div", { class: "value-grid", tabindex: 0, role: "region", "aria-label": "Values" });
  const numbers = make("details", { class: "explore-table" }, make("summary", {}, "The numbers, as a table"), grid);

  const header = createHeader({ lesson: about, home: places.home, models: null, theme, present: null, more: [], share: () => location.href });
  root.classList.add("explore");
  root.append(
    header,
    make(
      "main",
      { class: "explore-main" },
      make("p", { class: "kicker" }, make("a", { href: about.back }, `← ${about.title}`)),
      make("h1", {}, "Explore what this run recorded"),
      notices.element,
      make("div", { class: "explore-controls" }, tensor.node, down.node, across.node, sliders),
      state,
      meaning,
      make("p", { class: "explore-hint" }, "Point at a cell for its value. Click it, and the two lines run through it. Draw a box, and only its values are counted."),
      numbers,
    ),
  );

  const shown = new Map(); // axis -> {show(value), node}
  const list = (message) => {
    tensors = message.tensors;
    fill(tensor.input, tensors.map((one) => make("option", { value: one.key }, one.key)));
  };

  const cut = (message) => {
    const one = tensors.find((other) => other.key === message.key);
    const same = chosen.key === message.key;
    chosen = { key: message.key, down: message.down, across: message.across, held: same ? { ...message.held, ...chosen.held } : { ...message.held } };
    if (!one) return;
    tensor.input.value = one.key;
    const options = (now, other) => one.axes.map((axis) => make("option", { value: axis, selected: axis === now }, axis));
    fill(across.input, options(message.across));
    fill(down.input, message.down ? options(message.down) : [make("option", { value: "" }, "—")]);
    down.input.disabled = one.axes.length < 2;
    slide(one, message);
    say(meaning, [one.symbol, one.meaning, one.unit && `in ${one.unit}`].filter(Boolean).join(" · "));
    const range = [one.low, one.high, one.mean].map(short);
    say(state, `${one.axes.map((axis, i) => `${axis} ${one.shape[i]}`).join(" · ")} · ${one.dtype} · from ${range[0]} to ${range[1]}, mean ${range[2]}${message.whole ? "" : " · the first 1,024 positions are drawn"}`);
    tabulate(message);
    ready = true;
  };

  /** A slider for each axis that is held; made when the axes change, then only set. */
  const slide = (one, message) => {
    const held = Object.keys(message.held).filter((axis) => one.shape[one.axes.indexOf(axis)] > 1);
    if (held.join() !== [...shown.keys()].join() || sliders.dataset.key !== one.key) {
      shown.clear();
      sliders.dataset.key = one.key;
      for (const axis of held) shown.set(axis, heldSlider(axis, one.shape[one.axes.indexOf(axis)] - 1, (value) => choose({ held: { ...chosen.held, [axis]: value } })));
      fill(sliders, [...shown.values()].map((one_) => one_.node));
    }
    for (const axis of held) if (!shown.get(axis).active()) shown.get(axis).show(message.held[axis]);
  };

  const tabulate = (message) => {
    const data = plain(message.table);
    const [rows, columns] = message.table_shape;
    const head = make("tr", {}, make("th", { scope: "col" }, `${message.down || ""} ↓ ${message.across} →`), Array.from({ length: columns }, (_, i) => make("th", { scope: "col" }, String(i))));
    const body = Array.from({ length: rows }, (_, i) => make("tr", {}, make("th", { scope: "row" }, String(i)), [...data.subarray(i * columns, (i + 1) * columns)].map((v) => make("td", {}, short(v)))));
    const cut_ = rows < message.shape[0] || columns < message.shape[1];
    fill(grid, make("table", {}, make("caption", {}, cut_ ? `The first ${rows} × ${columns} of ${message.shape.join(" × ")} values` : `${message.shape.join(" × ")} values`), make("thead", {}, head), make("tbody", {}, body)));
  };

  const run = (message) => {
    if (message.state === "done" || message.state === "stopped") return;
    if (message.state === "failed") return notices.add(message.message, "warning");
    say(state, message.state === "queued" ? "Waiting for its turn …" : `Computing${message.total ? `: ${message.steps} of ${message.total}` : ` step ${message.steps}`} …`);
  };

  const handlers = { tensors: list, cut, run, notice: (message) => notices.add(message.text, message.level) };
  const pulse = createPulse({ send, onAway: notices.away, onHere: notices.here, onBack: () => notices.back(() => location.reload()) });
  model.on("msg:custom", (event) => {
    pulse.heard();
    const message = event.data ?? event;
    handlers[message.type]?.(message);
  });

  const dress = () => {
    const colours = palette(root);
    send({ type: "colours", colours: Object.fromEntries(TOLD.map((role) => [role, colours.role(role)])) });
  };
  (model.get("start")?.notices || []).forEach((text) => notices.add(text, "warning"));
  Object.defineProperty(window, "leanscope", {
    configurable: true,
    value: Object.freeze({
      get lesson() {
        return about.slug;
      },
      get ready() {
        return ready;
      },
    }),
  });
  dress();
  send({ type: "ready" });
  return { themed: dress, stop: pulse.stop };
}

function axisChoice(id, label, changed) {
  const input = make("select", { id, on: { change: changed } });
  return { node: make("div", { class: "knob" }, make("label", { for: id }, label), input), input };
}

function heldSlider(axis, high, changed) {
  const figure = make("output", { class: "knob-value" });
  const id = `explore-${axis}`;
  const input = make("input", { type: "range", id, min: 0, max: high, step: 1, value: 0 });
  const show = (value) => {
    input.value = String(value);
    say(figure, `${value} of ${high}`);
    input.style.setProperty("--share", `${(100 * value) / (high || 1)}%`);
  };
  input.addEventListener("input", () => {
    show(Number(input.value));
    changed(Number(input.value));
  });
  show(0);
  const active = () => input.getRootNode().activeElement === input;
  return { node: make("div", { class: "knob" }, make("div", { class: "knob-head" }, make("label", { for: id }, axis), figure), input), show, active };
}
