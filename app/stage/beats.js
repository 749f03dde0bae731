/**
 * The beats: one short text at a time, the place that it speaks of, now and then a guess to make or a thing to do.
 * Space or → goes on; nothing moves until then.
 */
import { fill, make, say } from "./dom.js";
import { doCard, guessCard } from "./cards.js";
import { rich } from "./text.js";

export function createBeats(lesson, { player, knobs, values, light, showScene, tip, changed, poll = () => null }) {
  const { beats } = lesson;
  const dashes = beats.map((_, i) => make("button", { type: "button", class: "dash", "aria-label": `Part ${i + 1} of ${beats.length}`, on: { click: () => open(i) } }));
  const body = make("div", { class: "beat-body", "aria-live": "polite" });
  const back = make("button", { type: "button", class: "back", on: { click: () => open(index - 1) } }, "← Back");
  const nextText = make("span", {}, "Next");
  const next = make("button", { type: "button", class: "next", on: { click: () => (isLast() ? leave() : open(index + 1)) } }, nextText, make("kbd", {}, "Space"));
  const keys = make("p", { class: "key-hints" }, ...hint("k", "play"), ...hint(", .", "step"), ...hint("t", "table"));
  const element = make(
    "section",
    { class: "beats", "aria-label": "The story" },
    make("nav", { class: "dashes", "aria-label": "Parts of the story" }, dashes),
    body,
    make("div", { class: "beat-buttons" }, back, next),
    keys,
  );
  let index = -1;
  const isLast = () => index === beats.length - 1;
  /** The lesson after this one, unless this page is the last, or stands alone. */
  const following = (lesson.lessons || []).find((other) => other.order > lesson.order && other.href);
  const leave = () => following && location.assign(following.href);
  let facts = {}; // measured in the run
  let given = {}; // known before anything is measured: whose run it is
  const known = () => ({ ...values, ...given, ...facts });
  let parts = [];
  let awaited = ""; // the fact that holds this beat's step, while it is not measured yet
  const guesses = new Map();
  const done = new Set();

  const hooks = {
    term(shown, key) {
      const meaning = meaningOf(key);
      if (!meaning) return make("span", {}, shown);
      const show = (event) => tip.under(event.currentTarget, key, meaning);
      return make("button", { type: "button", class: "term", "aria-description": meaning, on: { pointerenter: show, focus: show, click: show, pointerleave: tip.hide, blur: tip.hide } }, shown);
    },
    light(nodes, view) {
      const on = () => light(view);
      const off = () => light(beats[index].focus || "");
      return make("mark", { class: "light", tabindex: 0, on: { pointerenter: on, focus: on, pointerleave: off, blur: off } }, nodes);
    },
  };

  const meaningOf = (key) => {
    const found = Object.keys(lesson.glossary || {}).find((term) => term.toLowerCase() === key.toLowerCase());
    return found ? lesson.glossary[found] : "";
  };

  const open = (to, { quietly = false } = {}) => {
    if (to < 0 || to >= beats.length) return;
    const from = index;
    index = to;
    const beat = beats[index];
    const text = rich(beat.text, hooks);
    parts = [text];
    const cards = [];
    if (beat.predict) {
      const answer = () => facts[beat.predict.answer];
      cards.push(poll(beat.predict, index, answer) || guessCard(beat.predict, { answer, guesses, index }));
    }
    if (beat.do) cards.push(doCard(beat.do, done.has(index)));
    parts.push(...cards);
    fill(body, make("div", { class: "beat-text" }, text.nodes), cards.map((card) => card.element));
    parts.forEach((part) => part.fill(known()));
    dashes.forEach((dash, i) => {
      dash.classList.toggle("past", i < index);
      if (i === index) dash.setAttribute("aria-current", "step");
      else dash.removeAttribute("aria-current");
    });
    back.disabled = index === 0;
    next.disabled = isLast() && !following;
    say(nextText, isLast() ? (following ? `Next lesson: ${following.title}` : "The end") : "Next");
    next.classList.toggle("onward", isLast());
    tip.hide();
    light(beat.focus || "");
    if (!quietly) stageFor(beat, from);
    changed();
  };

  /** Bring the stage where the beat speaks of: scene, knobs, step. */
  const stageFor = (beat, from) => {
    if (beat.scene) showScene(beat.scene);
    knobs.setAll(beat.knobs || {});
    awaited = typeof beat.step === "string" && !(beat.step in facts) ? beat.step : "";
    const step = typeof beat.step === "string" ? facts[beat.step] : beat.step;
    if (typeof step !== "number") return;
    if (beat.play && index > from) player.glideTo(step);
    else player.waitFor(step);
  };

  const complete = (test) => {
    const beat = beats[index];
    if (!beat || !beat.do || done.has(index) || !test(beat.do)) return;
    done.add(index);
    parts.forEach((part) => part.finish?.());
  };

  return {
    element,
    open,
    /** Past the last beat, Space reaches for the button: a second press leaves for the next lesson. */
    next: () => (isLast() ? next.focus() : open(index + 1)),
    back: () => open(index - 1),
    get index() {
      return index;
    },
    given(about) {
      given = about;
      parts.forEach((part) => part.fill(known()));
    },
    facts(measured) {
      facts = { ...measured };
      parts.forEach((part) => part.fill(known()));
      if (awaited && awaited in facts) {
        player.waitFor(facts[awaited]);
        awaited = "";
      }
    },
    /** What beats may name: knobs, whose run it is, and what was measured. */
    known,
    focus: () => next.focus(),
    /** The same beat, its card made anew. */
    again: () => open(index, { quietly: true }),
    /** The learner took the player in hand: a step that is still awaited shall not pull it away. */
    taken() {
      awaited = "";
    },
    turned: (name) => complete((task) => task.knob === name),
    opened: (view) => complete((task) => task.cell && task.cell === view),
    played: () => complete((task) => task.play),
  };
}

function hint(key, meaning) {
  return [make("kbd", {}, key), ` ${meaning} `];
}
