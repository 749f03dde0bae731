/** Two bars a row that grow away from each other on one scale, the longer one firm: what limits, row by row. */
import { make, say } from "./dom.js";
import { format, visible } from "./text.js";

export function facing(host, spec, context) {
  const { store } = context;
  const list = make("div", { class: "facing", role: "img" });
  const head = make("div", { class: "facing-row facing-head" }, make("span", { class: "facing-left" }, spec.left_label), make("span", {}), make("span", {}, spec.right_label));
  host.append(context.bare ? "" : head, list);
  const rows = [];
  let step = 0;

  const row = (n) => {
    while (rows.length <= n) {
      const left = make("span", { class: `facing-bar fill-${spec.left_colour}` });
      const right = make("span", { class: `facing-bar fill-${spec.right_colour}` });
      const [leftFigure, rightFigure] = [make("span", { class: "facing-figure" }), make("span", { class: "facing-figure" })];
      const label = make("span", { class: "facing-label" });
      const node = make("div", { class: "facing-row" },
        make("span", { class: "facing-side facing-left" }, leftFigure, make("span", { class: "facing-room" }, left)), label,
        make("span", { class: "facing-side" }, make("span", { class: "facing-room" }, right), rightFigure));
      const at = rows.length;
      node.addEventListener("pointermove", (event) => context.tip.near(event, sentence(read()[at]).split(", ")));
      node.addEventListener("pointerleave", () => context.tip.hide());
      rows.push({ left, right, leftFigure, rightFigure, label, node });
      list.append(node);
    }
    return rows[n];
  };

  const read = () => {
    const rights = store.newest(spec.right, step) || [];
    const ids = Array.isArray(spec.labels) ? null : store.newest(spec.labels, step);
    const name = (i) => (ids ? visible(store.words.get(ids[i])) || `#${ids[i]}` : spec.labels[i] ?? String(i));
    return (store.newest(spec.left, step) || []).map((left, i) => ({ name: name(i), left, right: rights[i] ?? 0 }));
  };

  const sentence = ({ name, left, right }) =>
    `${name}, ${spec.left_label} ${format(left, spec.format)} ${spec.unit}, ${spec.right_label} ${format(right, spec.format)} ${spec.unit}`;

  return {
    draw(now) {
      step = now;
      const all = read();
      const most = Math.max(1e-12, ...all.flatMap(({ left, right }) => [left, right]));
      all.forEach(({ name, left, right }, n) => {
        const parts = row(n);
        say(parts.label, name);
        say(parts.leftFigure, format(left, spec.format));
        say(parts.rightFigure, format(right, spec.format));
        parts.left.style.transform = `scaleX(${left / most})`;
        parts.right.style.transform = `scaleX(${right / most})`;
        parts.node.classList.toggle("left-wins", left >= right);
        parts.node.classList.toggle("right-wins", right > left);
        parts.node.hidden = false;
      });
      rows.slice(all.length).forEach(({ node }) => (node.hidden = true));
      list.setAttribute("aria-label", `${spec.title}: ${all.map(sentence).join("; ")}`);
      return all.length > 0;
    },
    resize() {},
    dispose() {
      head.remove();
      list.remove();
    },
    table: () => ({
      columns: ["", `${spec.left_label}, ${spec.unit}`, `${spec.right_label}, ${spec.unit}`],
      rows: read().map(({ name, left, right }) => [name, format(left, ".4g"), format(right, ".4g")]),
    }),
  };
}
