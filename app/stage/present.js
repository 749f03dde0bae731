/** How the page may be seen from outside: on a projector, and by scripts. */
import { make } from "./dom.js";
import { enlargement, magnify } from "./glass.js";
import { calm } from "./player.js";

const WIDE = 1100; // what a projector's page is laid out for, and enlarged from
const TALL = 640;
const PHONE = 820; // nothing to enlarge on screens of at most this width
const BAR = 90; // what the transport takes at the bottom
const STILL = 2500; // milliseconds after which an idle pointer and the top line go

/**
 * The page on a projector: `?present=1`, kept in the address. Everything is enlarged, what the beat does not speak of
 * steps back (by CSS), and the screen can be blank. `changed(on)` is called when sizes and colours are others.
 */
export function presenting(root, { changed }) {
  const on = () => root.classList.contains("present");
  const blank = make("div", { class: "blank", hidden: true, role: "status", on: { click: () => lift() } }, make("span", { class: "visually-hidden" }, "The screen is blank. Any key brings the page back."));
  const listeners = new Set();
  let timer = 0;
  root.append(blank);

  const tell = () => listeners.forEach((listener) => listener());

  const lift = () => {
    if (blank.hidden) return false;
    blank.hidden = true;
    tell();
    return true;
  };

  const fit = () => {
    const { innerWidth, innerHeight } = window;
    const by = on() && innerWidth > PHONE ? Math.min(4, Math.max(1, Math.min(innerWidth / WIDE, innerHeight / TALL))) : 1;
    magnify(root, by);
    changed(on());
  };

  const stir = () => {
    if (!on()) return;
    root.classList.remove("idle");
    clearTimeout(timer);
    timer = setTimeout(() => root.classList.add("idle"), STILL);
  };

  const toggle = () => {
    root.classList.toggle("present");
    root.classList.remove("idle");
    lift();
    const url = new URL(location.href);
    if (on()) url.searchParams.set("present", "1");
    else url.searchParams.delete("present");
    if (location.protocol !== "file:") history.replaceState(history.state, "", url);
    if (!on() && document.fullscreenElement) document.exitFullscreen();
    fit();
    stir();
    tell();
    return on();
  };

  const resized = () => on() && fit();
  addEventListener("resize", resized);
  document.addEventListener("pointermove", stir);

  return {
    on,
    toggle,
    lift,
    listen: (listener) => listeners.add(listener),
    /** Black, until any of the keys that go on or back. */
    blank() {
      blank.hidden = !blank.hidden;
      tell();
    },
    get blanked() {
      return !blank.hidden;
    },
    /** The view that the beat speaks of, or the start of the page: into sight with it. */
    lit(element) {
      const behavior = calm() ? "auto" : "smooth";
      if (!on()) return;
      const fromTop = element ? element.getBoundingClientRect().bottom + window.scrollY : 0;
      if (fromTop < window.innerHeight - BAR * enlargement()) window.scrollTo({ top: 0, behavior });
      else element.scrollIntoView({ block: "nearest", behavior });
    },
    full() {
      if (document.fullscreenElement) document.exitFullscreen();
      else document.documentElement.requestFullscreen?.().catch(() => {}); // a frame may forbid it
    },
    stop() {
      clearTimeout(timer);
      removeEventListener("resize", resized);
      document.removeEventListener("pointermove", stir);
    },
  };
}

/** What tests and teachers' scripts may read; nothing that they could change. */
export function expose({ lesson, player, ready, run }) {
  const view = Object.freeze({
    get lesson() {
      return lesson.slug;
    },
    get step() {
      return player.step;
    },
    get steps() {
      return player.steps;
    },
    get ready() {
      return ready();
    },
    get frames() {
      return player.frames;
    },
    /** Which run the picture shows. */
    get run() {
      return run();
    },
  });
  Object.defineProperty(window, "leanscope", { value: view, configurable: true });
}
