/** The knobs: sliders, switches, choices and text, each labelled, with its error where the person looks. */
import { matrixKnob } from "./cells.js";
import { fill, make, say, throttled } from "./dom.js";
import { format } from "./text.js";

/**
 * `specs` as in lessons/knobs.py; `values` is the page's one object of current values, changed in place.
 * `send(values)` tells the server; `turned(name)` tells the beats.
 */
export function createKnobs(specs, values, { send, turned }) {
  const fields = new Map();
  const blamed = new Set(); // knobs for which a run failed
  const tell = throttled(() => send({ ...values }), 70);
  const element = make("div", { class: "knobs", role: "group", "aria-label": "Turn" });

  const set = (name, value, { quietly = false } = {}) => {
    if (!(name in values) || values[name] === value) return;
    values[name] = value;
    complain(name, "");
    fields.get(name)?.show(value);
    if (quietly) return;
    tell();
    turned(name);
  };

  const complain = (name, text) => {
    const field = fields.get(name);
    if (!field) return;
    say(field.error, text);
    field.error.hidden = !text;
    field.input.setAttribute("aria-invalid", String(Boolean(text)));
  };

  for (const spec of specs) {
    const make_ = { slider, switch: toggle, choice, text, matrix: matrixKnob }[spec.kind];
    if (!make_) continue;
    const field = make_(spec, (value) => set(spec.name, value), values[spec.name]);
    field.error = make("div", { class: "field-error", id: `error-${spec.name}`, role: "alert", hidden: true });
    field.input.setAttribute("aria-describedby", field.error.id);
    field.node.append(field.error);
    if (spec.doc) field.node.title = spec.doc;
    fields.set(spec.name, field);
    element.append(field.node);
  }

  return {
    element,
    set,
    /** Put the caret into a cell of a matrix. */
    edit: (name, row, column) => fields.get(name)?.edit?.(row, column),
    /** A beat turns several at once: one message. */
    setAll(given) {
      const changed = Object.entries(given).filter(([name, value]) => name in values && values[name] !== value);
      changed.forEach(([name, value]) => set(name, value, { quietly: true }));
      if (changed.length) tell();
    },
    /** A slider ends where the run's model does: a toy has fewer layers than the real one. */
    bound(model) {
      for (const spec of specs) {
        const count = model[spec.bounded_by];
        if (count) fields.get(spec.name)?.end?.(Math.min(spec.high, count - 1), values[spec.name]);
      }
    },
    /** Another run began: what the last one found wrong with a knob stands no more. */
    content() {
      blamed.forEach((name) => complain(name, ""));
      blamed.clear();
    },
    /** Show a server's complaint at its field; false when it is about no field here. */
    complain(message) {
      const spec = specs.find((s) => s.name === message.knob) || specs.find((s) => message.text.startsWith(`${s.label} `));
      if (!spec || !fields.has(spec.name)) return false;
      complain(spec.name, message.text);
      if (message.failed) blamed.add(spec.name);
      return true;
    },
  };
}

function slider(spec, set, value) {
  const figure = make("output", { class: "knob-value" });
  const places = (String(spec.step).split(".")[1] || "").length;
  const id = `knob-${spec.name}`;
  const input = make("input", { type: "range", id, min: spec.low, max: spec.high, step: spec.step, value });
  let high = spec.high;
  const show = (wanted) => {
    const now = Math.min(wanted, high);
    input.value = String(now);
    say(figure, format(Number(now), places ? `.${Math.min(3, places)}f` : ""));
    input.style.setProperty("--share", `${(100 * (now - spec.low)) / (high - spec.low || 1)}%`);
  };
  const end = (at, now) => {
    high = at;
    input.max = String(at);
    show(now);
  };
  input.addEventListener("input", () => set(Number(input.value)));
  show(value);
  return { node: make("div", { class: "knob" }, make("div", { class: "knob-head" }, make("label", { for: id }, spec.label), figure), input), input, show, end };
}

function toggle(spec, set, value) {
  const input = make("input", { type: "checkbox", role: "switch", id: `knob-${spec.name}`, class: "switch" });
  const show = (now) => {
    input.checked = Boolean(now);
  };
  input.addEventListener("change", () => set(input.checked));
  show(value);
  return { node: make("div", { class: "knob knob-switch" }, make("label", { for: input.id }, spec.label), input), input, show };
}

function choice(spec, set, value) {
  const options = spec.options.map((option, i) => make("option", { value: i }, option.label));
  const input = make("select", { id: `knob-${spec.name}` }, options);
  const show = (now) => {
    input.value = String(spec.options.findIndex((option) => option.value === now));
  };
  input.addEventListener("change", () => set(spec.options[Number(input.value)].value));
  show(value);
  return { node: make("div", { class: "knob" }, make("label", { for: input.id }, spec.label), input), input, show };
}

/** A text box changes nothing until Run is pressed (or Ctrl+Enter): half a prompt is not worth running. */
function text(spec, set, value) {
  const input = make("textarea", { id: `knob-${spec.name}`, rows: 4, maxlength: spec.limit, spellcheck: "false" });
  const count = make("span", { class: "counter" });
  const run = make("button", { type: "button", class: "run-button" }, "Run");
  let given = value;
  const tally = () => {
    say(count, `${format(input.value.length, ",d")} / ${format(spec.limit, ",d")}`);
    run.disabled = input.value === given || !input.value.trim();
  };
  const show = (now) => {
    given = now;
    input.value = now;
    tally();
  };
  const commit = () => {
    if (run.disabled) return;
    const typed = input.value;
    set(typed);
    given = typed;
    tally();
  };
  input.addEventListener("input", tally);
  input.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && commit());
  run.addEventListener("click", commit);
  show(value);
  return { node: make("div", { class: "knob" }, make("label", { for: input.id }, spec.label), input, make("div", { class: "knob-foot" }, count, run)), input, show };
}

/** The models as a segmented control, for the header; those that cannot be had say why. */
export function createModels(models, value, set) {
  const buttons = models.map((model) =>
    make(
      "button",
      { type: "button", class: "segment", "aria-pressed": "false", disabled: model.available === false, title: model.why || null, on: { click: () => set(model.value) } },
      model.label,
    ),
  );
  const show = (now) => buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(models[i].value === now)));
  show(value);
  const element = make("div", { class: "segments", role: "group", "aria-label": "Model" });
  fill(element, buttons);
  return { element, show };
}
