/**
 * Speaker notes: a second window for whoever presents, with this beat, the next one, what the guess comes to, and the
 * clock. It is drawn from here into a window of the same origin, by its handle: nothing is sent, so that it works in a
 * page opened from disk and without a network just as well.
 */
import { nearestOf } from "./cards.js";
import { fill, make, say } from "./dom.js";
import { listenKeys } from "./keys.js";
import { STYLES } from "./styles.js";
import { format, rich } from "./text.js";
import { loadFonts } from "./theme.js";

const TICK = 250; // milliseconds between two looks at the clock

/**
 * `talk`: beats (index, known()), clock, present, player, keys (what each key does), told() (one sentence: what plays
 * without the network), blocked() (the browser opened no window).
 */
export function createNotes({ lesson, root, fonts, talk }) {
  const { beats, clock, present } = talk;
  let popup = null;
  let parts = null;
  let timer = 0;
  let unlisten = null;

  const close = () => {
    clearInterval(timer);
    unlisten?.();
    const open = popup;
    popup = parts = unlisten = null;
    if (open && !open.closed) open.close();
  };

  const open = () => {
    if (popup && !popup.closed) return popup.focus();
    popup = window.open("", "leanscope-notes", "popup,width=980,height=720");
    if (!popup) return talk.blocked();
    const page = popup.document;
    page.title = `Notes · ${lesson.title || lesson.slug}`;
    page.documentElement.lang = "en";
    page.body.style.margin = "0";
    const sheet = new popup.CSSStyleSheet();
    sheet.replaceSync(STYLES);
    page.adoptedStyleSheets = [sheet];
    if (fonts) loadFonts(new URL(fonts, location.href).href, () => {}, popup);
    parts = build();
    page.body.replaceChildren(parts.element);
    unlisten = listenKeys(talk.keys, page);
    popup.addEventListener("pagehide", () => setTimeout(() => popup?.closed && close()));
    timer = setInterval(draw, TICK);
    return draw();
  };

  const build = () => {
    const button = (label, key, work, kind = "") => make("button", { type: "button", class: `plain-button ${kind}`, on: { click: work } }, make("span", {}, label), key ? make("kbd", {}, key) : null);
    const time = make("output", { class: "notes-clock", "aria-label": "Elapsed" });
    const hold = button("Pause", "", clock.toggle);
    const place = make("span", { class: "notes-place" });
    const now = make("section", { class: "notes-now", "aria-label": "Now" });
    const after = make("section", { class: "notes-next", "aria-label": "Next" });
    const status = make("p", { class: "notes-status", role: "status" });
    const blank = button("Blank", "B", talk.keys.b);
    const play = button("Play", "K", talk.keys.k);
    const element = make(
      "main",
      { class: "leanscope notes", "data-theme": root.dataset.theme },
      make("header", { class: "notes-head" }, time, hold, button("Set back", "", clock.reset), make("span", { class: "grow" }), place),
      make("h1", { class: "notes-title" }, lesson.question),
      make("div", { class: "notes-beats" }, now, after),
      make("footer", { class: "notes-foot" }, button("Back", "←", talk.keys.ArrowLeft), button("Next", "Space", talk.keys[" "], "notes-go"), play, blank, status),
    );
    return { element, time, hold, place, now, after, status, blank, play, shown: "" };
  };

  const draw = () => {
    if (!popup) return;
    if (popup.closed) return close();
    const { index } = beats;
    const known = beats.known();
    say(parts.time, clock.text);
    say(parts.hold.firstChild, clock.running ? "Pause" : "Go on");
    parts.time.classList.toggle("held", !clock.running);
    say(parts.place, `${index + 1} of ${lesson.beats.length}`);
    say(parts.status, talk.told());
    say(parts.blank.firstChild, present.blanked ? "Show" : "Blank");
    say(parts.play.firstChild, talk.player.playing ? "Pause" : "Play");
    parts.element.dataset.theme = root.dataset.theme;
    const shown = `${index} ${JSON.stringify(known)}`;
    if (shown === parts.shown) return;
    parts.shown = shown;
    fill(parts.now, ...described(lesson, index, known, "Now"));
    fill(parts.after, ...described(lesson, index + 1, known, "Next"));
  };

  return {
    open,
    close,
    draw,
    get shown() {
      return Boolean(popup && !popup.closed);
    },
  };
}

const PLAINLY = { term: (shown) => make("em", {}, shown), light: (nodes) => make("mark", { class: "light" }, nodes) };

/** A beat for whoever presents: its words, what it does to the page, what to say, what to guess and what it comes to. */
function described(lesson, index, known, kind) {
  const beat = lesson.beats[index];
  const head = make("h2", { class: "kicker" }, kind);
  if (!beat) return [head, make("p", { class: "notes-end" }, "The end.")];
  const written = (text) => {
    const made = rich(text, PLAINLY);
    made.fill(known);
    return made.nodes;
  };
  const turned = Object.entries(beat.knobs || {}).map(([name, value]) => `${lesson.knobs.find((spec) => spec.name === name)?.label || name}: ${format(value)}`);
  const does = [...turned, beat.play ? "plays to its step" : ""].filter(Boolean).join(" · ");
  return [
    head,
    make("div", { class: "beat-text" }, written(beat.text)),
    beat.notes ? make("div", { class: "notes-say" }, written(beat.notes)) : null,
    beat.do ? make("div", { class: "notes-do" }, make("strong", {}, "To do: "), ...written(beat.do.text)) : null,
    beat.predict ? guess(beat.predict, known, written) : null,
    does ? make("p", { class: "small" }, does) : null,
  ];
}

function guess(predict, known, written) {
  const value = known[predict.answer];
  const unit = predict.unit ? ` ${predict.unit}` : "";
  const there = typeof value === "number";
  return make(
    "div",
    { class: "notes-guess" },
    written(predict.question),
    make("p", { class: "small" }, `Choices: ${predict.options.map((option) => format(option)).join(", ")}`),
    there
      ? make("p", {}, "Measured: ", make("strong", { class: "measured" }, `${format(value, predict.format)}${unit}`), ` · nearest is ${format(nearestOf(predict.options, value))}`)
      : make("p", {}, "Being measured …"),
  );
}
