/** One cell, one click deep: its sum in symbols and in this run's numbers, and the vectors in it as small bars. */
import { fill, make } from "./dom.js";
import { short } from "./text.js";

const LONGEST = 128; // bars drawn of one vector

export function createCell({ closed }) {
  const body = make("div", { class: "cell-body" });
  const close = make("button", { type: "button", class: "icon-button", "aria-label": "Close", on: { click: () => hide() } }, "✕");
  const element = make("section", { class: "cell-card", "aria-label": "One cell", hidden: true, tabindex: -1 }, make("header", {}, make("h3", {}, "One cell"), close), body);

  const hide = () => {
    if (element.hidden) return false;
    element.hidden = true;
    closed();
    return true;
  };

  return {
    element,
    hide,
    wait() {
      element.hidden = false;
      if (!body.childElementCount) fill(body, make("p", { class: "cell-note" }, "Reading …"));
    },
    show(message) {
      element.hidden = false;
      element.scrollIntoView({ block: "nearest" });
      if (message.error) return fill(body, make("p", { class: "field-error" }, message.error));
      const lines = message.lines.map(([expression, value]) =>
        make("div", { class: "cell-line" }, make("span", { class: "cell-expression" }, lowered(expression)), /→\s*$/.test(expression) ? null : make("span", { class: "cell-equals" }, "="), make("strong", {}, value)),
      );
      const vectors = (message.vectors || []).map(([name, numbers]) => vector(name, [...numbers]));
      return fill(
        body,
        make("p", { class: "cell-title" }, message.title),
        vectors,
        make("div", { class: "cell-lines", "aria-live": "polite" }, lines),
        message.note ? make("p", { class: "cell-note" }, message.note) : null,
      );
    },
  };
}

/** "q_12 · k_3" with its indices lowered: what follows an underscore, up to a blank or a sign. */
function lowered(expression) {
  return expression.split(/(_\{[^}]*\}|_[\w,]+)/).map((part) =>
    part.startsWith("_") ? make("sub", {}, part.slice(1).replace(/[{}]/g, "")) : part,
  );
}

/** A row of numbers as bars about zero; each bar's value in its title, the whole as a label. */
function vector(name, numbers) {
  const shown = numbers.slice(0, LONGEST);
  const most = shown.reduce((a, v) => Math.max(a, Math.abs(v)), 1e-12);
  const role = /[·×*∘⊙]/.test(name) ? "sink" : /^q/i.test(name) ? "query" : /^k/i.test(name) ? "key" : /^v/i.test(name) ? "value" : "sink";
  const bars = shown.map((v, i) =>
    make("span", {
      class: `vector-bar ${v < 0 ? "minus" : "plus"}`,
      title: `${name}[${i}] = ${short(v)}`,
      style: { "--size": `${(50 * Math.abs(v)) / most}%` },
    }),
  );
  const more = numbers.length > LONGEST ? ` (first ${LONGEST} of ${numbers.length})` : "";
  return make(
    "div",
    { class: `vector fill-of-${role}` },
    make("span", { class: "vector-name" }, `${name}${more}`),
    make("div", { class: "vector-bars", role: "img", "aria-label": `${name}: ${numbers.length} numbers, largest ${short(most)} in size` }, bars),
  );
}
