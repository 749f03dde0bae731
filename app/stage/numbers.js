/** Figures side by side: each the value at the player's step. */
import { make, say } from "./dom.js";
import { format } from "./text.js";

export function numbers(host, spec, context) {
  const cells = spec.numbers.map((number) => {
    const value = make("div", { class: `figure ink-${number.colour}` }, "…");
    const unit = number.unit ? make("span", { class: "unit" }, number.unit) : null;
    const node = make(
      "div",
      { class: "number" },
      make("div", { class: "small" }, number.label),
      make("div", { class: "number-value" }, value, unit),
      number.detail ? make("div", { class: "small faint" }, number.detail) : null,
    );
    return { number, value, node };
  });
  const row = make("div", { class: "numbers" }, cells.map((cell) => cell.node));
  host.append(row);
  let step = 0;

  const read = ({ number }) => {
    const track = context.store.of(number.tensor);
    const value = track ? track.scalarAt(step) : null;
    return Number.isNaN(value) ? null : value; // no number: nothing to tell
  };

  return {
    draw(now) {
      step = now;
      for (const cell of cells) say(cell.value, format(read(cell), cell.number.format));
      return cells.some((cell) => read(cell) !== null);
    },
    resize() {},
    dispose() {
      row.remove();
    },
    table: () => ({
      columns: ["figure", "value", "unit"],
      rows: cells.map((cell) => [cell.number.label, format(read(cell), cell.number.format), cell.number.unit]),
    }),
  };
}
