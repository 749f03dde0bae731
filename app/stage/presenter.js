/** What whoever presents has at hand: the keys that clickers send, notes, the clock, and all beats fetched ahead. */
import { createClock } from "./clock.js";
import { make, say } from "./dom.js";
import { createNotes } from "./notes.js";

const SETTLED = 1500; // milliseconds that the knobs rest before what the beats will show is fetched for them

export function createPresenter({ lesson, root, places, present, beats, player, reel, notices, send, inHand, toggle, redraw }) {
  const clock = createClock();
  let away = false;
  let asked = 0;
  let beginning = true;

  const here = (work) => () => (present.on() ? work() : false);
  const go = () => (present.lift() ? undefined : beats.next());
  const back = () => (present.lift() ? undefined : beats.back());
  const blank = here(() => present.blank());
  const openNotes = here(() => notes.open());
  const stepBack = inHand(() => player.by(-1));
  const stepOn = inHand(() => player.by(1));

  /** Clickers send Page keys, some Enter, and a full stop or b for a blank screen. */
  const keys = {
    " ": go,
    ArrowRight: go,
    ArrowLeft: back,
    PageDown: here(go),
    PageUp: here(back),
    Enter: here(go),
    Backspace: here(back),
    ".": () => (present.on() ? present.blank() : stepOn()),
    b: blank,
    B: blank,
    n: openNotes,
    N: openNotes,
    f: here(() => present.full()),
    j: here(stepBack),
    l: here(stepOn),
    P: () => void present.toggle(),
  };

  const fetchAhead = () => {
    clearTimeout(asked);
    asked = setTimeout(() => present.on() && send({ type: "ahead" }), beginning ? 0 : SETTLED);
    beginning = false;
  };

  const told = () => {
    const { told: news } = reel;
    const whole = news && news.kept === news.of;
    const all = whole ? "Every part is in this page and plays on without the network." : news ? `${news.kept} of ${news.of} settings of the knobs are in this page. ${news.left[0] || ""}` : "";
    return [away ? "The server is away." : "", all].filter(Boolean).join(" ");
  };

  const notes = createNotes({
    lesson,
    root,
    fonts: places.fonts,
    talk: { beats, clock, present, player, keys: { ...keys, k: toggle, p: toggle }, told, blocked: () => notices.add("The browser kept the notes from opening in a window of their own. Allow pop-ups for this page, then press N.", "warning") },
  });

  const time = make("output", { class: "present-clock", "aria-label": "Elapsed" });
  const hold = make("button", { type: "button", class: "plain-button", on: { click: () => tick(clock.toggle()) } });
  const tool = (label, key, work) => make("button", { type: "button", class: "plain-button", title: `${label} (${key})`, on: { click: work } }, label);
  const reset = make("button", { type: "button", class: "plain-button", "aria-label": "Set the clock back", on: { click: () => tick(clock.reset()) } }, "0:00");
  const element = make("div", { class: "present-tools", role: "group", "aria-label": "Presenting" }, time, hold, reset, tool("Notes", "N", openNotes), tool("Blank", "B", blank), tool("Full screen", "F", keys.f));

  function tick() {
    say(time, clock.text);
    say(hold, clock.running ? "Pause" : "Go on");
    hold.setAttribute("aria-label", clock.running ? "Hold the clock" : "Let the clock go on");
  }
  const timer = setInterval(() => present.on() && tick(), 500);
  const leave = () => notes.close();
  addEventListener("pagehide", leave);
  tick();

  return {
    element,
    keys,
    /** Presenting began or ended, or the screen's size changed. */
    changed() {
      if (present.on()) {
        if (!reel.told) fetchAhead();
        clock.start();
        tick();
      } else {
        notes.close();
      }
      redraw();
    },
    /** Another beat: its knob comes to hand, and what it speaks of into sight. */
    moved() {
      const beat = lesson.beats[beats.index];
      if (!beat) return;
      root.querySelectorAll(".side .knob").forEach((knob) => knob.classList.toggle("asked", Boolean(beat.do?.knob) && knob.querySelector(`#knob-${beat.do.knob}`) !== null));
      if (!beat.focus) present.lit(null);
    },
    /** A knob was turned: the beats will show other runs. */
    turned: () => present.on() && fetchAhead(),
    get away() {
      return away;
    },
    set away(is) {
      away = is;
    },
    stop() {
      clearInterval(timer);
      clearTimeout(asked);
      removeEventListener("pagehide", leave);
      notes.close();
    },
  };
}
