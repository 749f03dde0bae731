/** At the knobs of a page that is a recording: which settings it has, as buttons, and where the rest is to be had. */
import { make } from "./dom.js";

/**
 * `recorded`: {engine {version, address}, where, snapshots [{name, values}]}, as app/stage/still.js gives it. It gets
 * `put(values)`: show the knobs as they really stand, when what was turned is not to be had.
 */
export function markRecorded(recorded, lesson, knobs, models) {
  const { engine, snapshots, where } = recorded;
  recorded.put = (values) => {
    for (const [name, value] of Object.entries(values)) knobs.set(name, value, { quietly: true });
    models?.show(values.model);
  };
  for (const spec of lesson.knobs) {
    const knob = knobs.element.querySelector(`#knob-${spec.name}`)?.closest(".knob");
    const values = [...new Set(snapshots.map((snapshot) => snapshot.values[spec.name]))];
    if (!knob || spec.look || spec.kind === "text" || values.length < 2 || all(spec, values)) continue;
    const button = (value) => make("button", { type: "button", class: "recorded-value", "aria-label": `${spec.label} ${labelOf(spec, value)}, recorded`, on: { click: () => knobs.set(spec.name, value) } }, labelOf(spec, value));
    const sorted = typeof values[0] === "number" ? values.sort((a, b) => a - b) : values;
    knob.append(make("div", { class: "recorded", role: "group", "aria-label": `Recorded for ${spec.label}` }, make("span", {}, "recorded"), sorted.map(button)));
  }
  const words = snapshots.length > 1 ? "Settings marked as recorded play at once; any other takes the engine." : "Other settings take the engine.";
  const address = engine.address.replace(/\/+$/, "");
  const link = address ? make("a", { href: `${address}/lesson/${lesson.slug}` }, "Open this lesson with the engine") : where;
  knobs.element.prepend(make("p", { class: "recorded-note" }, `This page is a recording, made with Leanscope ${engine.version}. ${words} `, link));
}

/** Every setting that there is: nothing to mark. */
function all(spec, values) {
  return spec.kind === "switch" || (spec.options || [0]).every((option) => values.includes(option.value));
}

function labelOf(spec, value) {
  if (spec.kind === "switch") return value ? "on" : "off";
  return spec.options?.find((option) => option.value === value)?.label ?? String(value);
}
