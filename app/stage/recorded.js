/** At the knobs of a page that is a recording: which settings it has, as buttons, and where the rest is to be had. */
import { make } from "./dom.js";

/**
 * `recorded`: {version, where: a sentence, live(): the address of an engine at what was asked (or null), snapshots: the
 * knobs of each}, as app/stage/still.js gives it. It gets `put(values)`: show the knobs as they really stand, when what
 * was turned is not to be had.
 */
export function markRecorded(recorded, lesson, knobs, models) {
  recorded.put = (values) => {
    for (const [name, value] of Object.entries(values)) knobs.set(name, value, { quietly: true });
    models?.show(values.model);
  };
  let marked = false;
  for (const spec of lesson.knobs) {
    const knob = knobs.element.querySelector(`#knob-${spec.name}`)?.closest(".knob");
    const values = [...new Set(recorded.snapshots.map((snapshot) => snapshot[spec.name]))];
    if (!knob || spec.look || spec.kind === "text" || values.length < 2) continue;
    marked = true;
    const button = (value) => make("button", { type: "button", class: "recorded-value", "aria-label": `${spec.label} ${labelOf(spec, value)}, recorded`, on: { click: () => knobs.set(spec.name, value) } }, labelOf(spec, value));
    const sorted = typeof values[0] === "number" ? values.sort((a, b) => a - b) : values;
    knob.append(make("div", { class: "recorded", role: "group", "aria-label": `Recorded for ${spec.label}` }, make("span", {}, "recorded"), sorted.map(button)));
  }
  const words = marked ? "Settings marked as recorded play at once; any other takes the engine." : "Other settings take the engine.";
  const link = recorded.live && make("a", { href: recorded.live(), on: { click: () => link.setAttribute("href", recorded.live()) } }, "Open this with the engine");
  knobs.element.prepend(make("p", { class: "recorded-note" }, `This page is a recording, made with Leanscope ${recorded.version}. ${words} `, link || recorded.where));
}

function labelOf(spec, value) {
  if (spec.kind === "switch") return value ? "on" : "off";
  return spec.options?.find((option) => option.value === value)?.label ?? String(value);
}
