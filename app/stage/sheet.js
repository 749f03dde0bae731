/** A small table: words as a source gives them, and figures of this run that move with the player. */
import { make, say } from "./dom.js";
import { format } from "./text.js";

export function sheet(host, spec, context) {
  const { store } = context;
  const live = []; // figures of the run: {number, node}
  const cellOf = (entry, i) => {
    const tag = i ? "td" : "th";
    const props = i ? {} : { scope: "row" };
    if (typeof entry === "string") return make(tag, { ...props, class: i ? "" : "sheet-name" }, entry);
    const node = make(tag, { ...props, class: `sheet-live ink-${entry.colour}` }, "…");
    live.push({ number: entry, node });
    return node;
  };
  const kinds = spec.kinds.length ? make("tr", { class: "sheet-kinds" }, spec.columns.map((_, i) => make("td", {}, spec.kinds[i] ? make("span", { class: `origin origin-${spec.kinds[i]}` }, spec.kinds[i]) : ""))) : null;
  const head = make("thead", {}, make("tr", {}, spec.columns.map((name) => make("th", { scope: "col" }, name))), context.bare ? null : kinds);
  const body = make("tbody", {}, spec.rows.map((row) => make("tr", {}, row.map(cellOf))));
  const wrap = make("div", { class: "sheet", tabindex: 0, role: "region", "aria-label": spec.title }, make("table", {}, head, body));
  const source = spec.source ? make("p", { class: "sheet-source" }, spec.source) : "";
  host.append(wrap, context.bare ? "" : source);
  let step = 0;

  const read = ({ number }) => {
    const track = store.of(number.tensor);
    const value = track ? track.scalarAt(step) : null;
    if (value === null) return "…";
    return Number.isNaN(value) ? "–" : `${format(value, number.format)}${number.unit ? ` ${number.unit}` : ""}`;
  };

  return {
    draw(now) {
      step = now;
      for (const one of live) say(one.node, read(one));
      return true;
    },
    resize() {},
    dispose() {
      wrap.remove();
      if (source) source.remove();
    },
    table: () => {
      const figures = live.map(read);
      return { columns: spec.columns, rows: spec.rows.map((row) => row.map((entry) => (typeof entry === "string" ? entry : figures.shift()))) };
    },
  };
}
