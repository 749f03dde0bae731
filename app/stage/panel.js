/** The card around a view: title, where its numbers come from, the picture or its table, the tensor's name. */
import { css } from "./colours.js";
import { fill, make } from "./dom.js";
import { short } from "./text.js";

/** A view's tensors, wherever they stand in its declaration. */
export function tensorsOf(value) {
  if (!value || typeof value !== "object") return [];
  if (typeof value.track === "string") return [value.track];
  return Object.values(value).flatMap(tensorsOf);
}

/** "real · SmolLM2-135M · layer 16, head 7": what kind of thing is shown, of which model, from where in it. */
export function originOf(view, store, knobs) {
  const kind = view.origin || store.model.kind || "";
  const ids = tensorsOf(view);
  const where = {};
  for (const id of ids) {
    // What is drawn, which may be the nearest to what was asked for: a toy has fewer layers than the knob.
    const inner = /\[(.*)\]$/.exec(store.of({ track: id })?.about.name || id);
    for (const pair of inner ? inner[1].split(",") : []) {
      const [key, value] = pair.split("=");
      where[key] = key in where && where[key] !== value ? null : value;
    }
  }
  if (view.facet && view.focus && view.focus.knob) where[view.facet] = knobs[view.focus.knob];
  const other = kind === "toy" && store.model.kind !== "toy"; // a toy beside the real model that the learner chose
  const places = ["layer", "head", "block"].filter((key) => where[key] !== undefined && where[key] !== null);
  const parts = [kind, ["reported", "formula"].includes(kind) || other ? "" : store.model.name, places.map((key) => `${key} ${where[key]}`).join(", ")];
  const say = (list) => list.filter(Boolean).join(" · ");
  return { kind, text: say(parts), short: say([parts[0], parts[2]]), tensors: [...new Set(ids)] };
}

export function createPanel(view, index, hooks) {
  const { store, knobs } = hooks;
  const title = make("h3", { class: "panel-title" }, view.title || view.name || view.kind);
  const note = view.note ? make("span", { class: "panel-note" }, view.note) : null;
  const origin = make("span", { class: "origin" });
  const flip = make("button", { class: "icon-button flip", type: "button", "aria-pressed": "false", "aria-label": `Show ${view.title || view.kind} as a table`, title: "Show as a table (t)" }, "▤");
  const host = make("div", { class: `view view-${view.kind}` });
  const table = make("div", { class: "view-table", hidden: true, tabindex: 0, role: "region", "aria-label": `${view.title || view.kind}, as a table` });
  const foot = make("div", { class: "panel-foot" });
  const element = make(
    "section",
    { class: "panel", style: { "--span": view.span }, "data-view": view.name || null, "data-index": index, "aria-label": view.title || view.kind },
    make("header", { class: "panel-head" }, title, note, origin, flip),
    host,
    table,
    foot,
  );

  /** `own`: what the picture says of itself where it knows better, as of cells that someone typed. */
  const label = (own) => {
    const { kind, text, short: brief, tensors } = own ? { ...originOf(view, store, knobs), kind: own, text: own, short: own } : originOf(view, store, knobs);
    origin.textContent = view.span < 8 ? brief : text;
    origin.className = `origin origin-${kind || "none"}`;
    origin.hidden = !text;
    origin.title = `${text}; drawn from ${tensors.join(", ")}`;
  };

  /** What the picture's colours mean: the tensor's name, symbol and meaning, and the scale between its bounds. */
  const legend = (scale) => {
    if (!scale) return;
    const track = store.of(view.tensor);
    const { table: colours, bounds, power, states = [] } = scale;
    const stops = [0, 0.25, 0.5, 0.75, 1].map((t) => css(colours[Math.round(255 * t ** power)])).join(", ");
    const bar = make("span", { class: "scale-bar", style: { background: `linear-gradient(90deg, ${stops})` } });
    const name = make("span", { class: "tensor-name" }, track.about.name);
    const meaning = track.about.meaning ? make("span", { class: "tensor-meaning" }, track.about.meaning) : null;
    const fills = states.map((_, i) => css(colours[Math.round((255 * i) / Math.max(1, states.length - 1))]));
    const keys = states.map((state, i) => make("span", { class: "key", style: { "--fill": fills[i] } }, make("span", { class: "key-text" }, state)));
    if (keys.length) return fill(foot, make("div", { class: "legend" }, keys), name, meaning);
    return fill(foot, name, meaning, make("span", { class: "scale" }, short(bounds[0]), bar, short(bounds[1])));
  };

  const tabulate = (data) => {
    const head = make("tr", {}, data.columns.map((name) => make("th", { scope: "col" }, String(name))));
    const rows = data.rows.map((row) => make("tr", {}, row.map((value, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, String(value)))));
    fill(table, make("table", {}, make("thead", {}, head), make("tbody", {}, rows)));
  };

  return { element, host, label, legend, tabulate, flip, get tabled() {
    return !table.hidden;
  }, show(asTable) {
    table.hidden = !asTable;
    host.hidden = asTable;
    flip.setAttribute("aria-pressed", String(asTable));
  } };
}
