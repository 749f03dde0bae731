/** A labelled distribution at the player's step: the next token, the load of experts. */
import { make, say } from "./dom.js";
import { format, visible } from "./text.js";

const BARS = 24; // bars drawn; the table has them all

/** What has not been measured yet has no length. */
const barLength = (value) => (Number.isFinite(value) ? value : 0);

export function bars(host, spec, context) {
  const { store } = context;
  const list = make("div", { class: "bars", role: "img" });
  host.append(list);
  const rows = [];
  let step = 0;

  const row = (n) => {
    while (rows.length <= n) {
      const label = make("span", { class: "bar-label" });
      const bar = make("span", { class: `bar fill-${spec.colour}` });
      const value = make("span", { class: "bar-value" });
      rows.push({ label, bar, value, node: make("div", { class: "bar-row" }, label, make("span", { class: "bar-ground" }, bar), value) });
      list.append(rows[rows.length - 1].node);
    }
    return rows[n];
  };

  const nameOf = (n, ids) => {
    if (Array.isArray(spec.labels)) return spec.labels[n] ?? String(n);
    if (!ids) return String(n);
    const id = ids[n];
    return store.words.has(id) ? visible(store.words.get(id)) : `#${id}`;
  };

  /** The newest [name, value] pairs at the step. */
  const read = () => {
    const ids = Array.isArray(spec.labels) ? null : store.newest(spec.labels, step);
    return (store.newest(spec.values, step) || []).map((value, i) => [nameOf(i, ids), value]);
  };

  return {
    draw(now) {
      step = now;
      const pairs = read();
      const shown = pairs.slice(0, BARS);
      const high = spec.high ?? Math.max(1e-9, ...pairs.map(([, value]) => barLength(value)));
      shown.forEach(([name, value], n) => {
        const { label, bar, value: figure, node } = row(n);
        say(label, name);
        say(figure, Number.isFinite(value) ? format(value, spec.format) : "–");
        bar.style.transform = `scaleX(${Math.max(0, Math.min(1, barLength(value) / high))})`;
        node.hidden = false;
      });
      rows.slice(shown.length).forEach(({ node }) => (node.hidden = true));
      const most = shown.reduce((best, pair) => (best && barLength(best[1]) >= barLength(pair[1]) ? best : pair), null);
      list.setAttribute("aria-label", most ? `${spec.title}: most, ${format(most[1], spec.format)}, for “${most[0]}”` : spec.title);
      return shown.length > 0;
    },
    resize() {},
    dispose() {
      list.remove();
    },
    table: () => ({ columns: ["label", "value"], rows: read().map(([name, value]) => [name, format(value, ".4g")]) }),
  };
}
