/**
 * A calculator: numbers that the learner types, what the engine's formulas make of them, and a plain sentence at the
 * field where they make no sense.
 */
import { fill, make, say, throttled } from "./dom.js";

export function calculator(host, spec, context) {
  const fields = new Map();
  const values = Object.fromEntries(spec.fields.map((field) => [field.name, field.value]));
  const name = (spec.name || "calculator").replace(/\W/g, "-");
  const result = make("div", { class: "calculator-result", "aria-live": "polite" });
  const general = make("div", { class: "field-error", role: "alert", hidden: true });
  let asked = false;
  let rows = [];

  const complain = (which, text) => {
    for (const [field, { error, input }] of fields) {
      const mine = field === which ? text : "";
      say(error, mine);
      error.hidden = !mine;
      input.setAttribute("aria-invalid", String(Boolean(mine)));
    }
    say(general, which ? "" : text);
    general.hidden = Boolean(which) || !text;
  };

  const answered = (message) => {
    complain(message.field || "", message.error || "");
    if (message.error) {
      result.classList.add("stale");
      return;
    }
    result.classList.remove("stale");
    rows = message.lines;
    fill(
      result,
      message.title ? make("p", { class: "cell-title" }, message.title) : null,
      make("dl", { class: "calculator-lines" }, message.lines.flatMap(([label, value]) => [make("dt", {}, label), make("dd", {}, value)])),
      message.note ? make("p", { class: "cell-note" }, message.note) : null,
    );
  };

  const ask = throttled(() => context.calculate({ ...values }, answered), 120);

  const presets = make("select", { id: `${name}-preset` }, make("option", { value: "" }, "typed in"), spec.presets.map(([label], i) => make("option", { value: i }, label)));
  presets.addEventListener("change", () => {
    const chosen = spec.presets[Number(presets.value)];
    if (presets.value === "" || !chosen) return;
    for (const [field, value] of Object.entries(chosen[1])) {
      if (!fields.has(field)) continue;
      values[field] = value;
      fields.get(field).input.value = String(value);
    }
    ask();
  });

  const nodes = spec.fields.map((field) => {
    const id = `${name}-${field.name}`;
    const error = make("div", { class: "field-error", id: `${id}-error`, role: "alert", hidden: true });
    const input = make("input", { type: "number", id, value: field.value, min: field.low, max: field.high, step: field.whole ? 1 : "any", "aria-describedby": error.id, inputmode: "decimal" });
    input.addEventListener("input", () => {
      presets.value = "";
      const typed = input.value.trim() === "" ? NaN : Number(input.value);
      values[field.name] = typed;
      if (!Number.isFinite(typed)) return complain(field.name, `${field.label} must be a number from ${field.low} to ${field.high}.`);
      return ask();
    });
    fields.set(field.name, { input, error });
    return make("div", { class: "calculator-field" }, make("label", { for: id }, field.label), make("span", { class: "calculator-input" }, input, field.unit ? make("span", { class: "unit" }, field.unit) : null), error);
  });

  const preset = spec.presets.length ? make("div", { class: "calculator-field" }, make("label", { for: presets.id }, "Model"), presets) : null;
  if (spec.presets.length) presets.value = "0";
  if (spec.presets.length) for (const [field, value] of Object.entries(spec.presets[0][1])) {
    values[field] = value;
    if (fields.has(field)) fields.get(field).input.value = String(value);
  }
  const form = make("form", { class: "calculator-form", on: { submit: (event) => event.preventDefault() } }, preset, nodes, general);
  const box = make("div", { class: "calculator" }, form, result);
  host.append(context.bare ? "" : box);

  return {
    draw() {
      if (!asked && context.calculate) {
        asked = true;
        ask();
      }
      return true;
    },
    resize() {},
    dispose: () => box.remove(),
    table: () => ({ columns: ["figure", "value"], rows }),
  };
}
