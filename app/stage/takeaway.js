/** What one may take away from a page: its picture, an animation, the tensors, the claims, and a link to this very state. */
import { make, say } from "./dom.js";
import { createCamera } from "./film.js";
import { save } from "./tensors.js";
import { tokenOf } from "./token.js";

const MOST_FRAMES = 400;
const RATES = [1, 2, 5, 10, 20];

/**
 * `page`: player, scenes (what film.js calls the stage), send, away(), word (what a step is called), place() {knobs,
 * beat, step}, name() of the scene.
 */
export function createTakeaway({ lesson, folder, page }) {
  const { player, scenes, send, word } = page;
  const camera = createCamera(scenes, folder);
  const defaults = Object.fromEntries(lesson.knobs.map((spec) => [spec.name, spec.default]));
  let filming = false;

  const button = (label, work, kind = "") => make("button", { type: "button", class: `plain-button ${kind}`, on: { click: work } }, label);
  const field = (label, input) => make("label", { class: "take-field" }, make("span", {}, label), input);
  const number = (value) => make("input", { type: "number", min: 1, step: 1, value, on: { input: () => tell() } });
  const [from, to, every] = [number(1), number(1), number(1)];
  const rate = make("select", { on: { change: () => tell() } }, RATES.map((value) => make("option", { value, selected: value === 5 }, `${value} a second`)));
  const status = make("p", { class: "take-status", role: "status" });
  const film = button("GIF", () => (filming ? (filming = false) : shoot()), "take-film");
  const length = make("span", { class: "small" });
  const link = make("input", { type: "text", readonly: true, class: "take-link", "aria-label": "Link to this state", on: { focus: () => link.select() } });
  const here = make("p", { class: "small" });
  const part = (title, ...inside) => make("section", { class: "take-part" }, make("h3", {}, title), ...inside);
  const dialog = make(
    "dialog",
    { class: "take", "aria-labelledby": "take-title" },
    make("header", {}, make("h2", { id: "take-title" }, "Take away"), button("✕", () => dialog.close(), "icon-button")),
    part("Picture", here, make("div", { class: "take-row" }, button("PNG", () => picture("png")), button("SVG", () => picture("svg")))),
    part("Animation", make("div", { class: "take-row" }, field(`From ${word}`, from), field("to", to), field("every", every), field("Speed", rate)), make("div", { class: "take-row" }, film, length)),
    part("Numbers", make("div", { class: "take-row" }, button("All tensors (.npz)", () => download("npz")), button("The claims (.csv)", () => download("claims")))),
    part("Link to exactly this state", make("div", { class: "take-row" }, link, button("Copy", copy))),
    status,
  );
  dialog.querySelector("header button").setAttribute("aria-label", "Close");

  const file = (ending) => `leanscope-${lesson.slug}-${page.name() || "scene"}-${word}-${player.step + 1}.${ending}`.replace(/[^\w.-]+/g, "-");

  /** The steps asked for, or the sentence that says what is wrong with them. */
  const wanted = () => {
    const [a, b, n] = [from, to, every].map((input) => Number(input.value));
    if (![a, b, n].every((value) => Number.isInteger(value) && value >= 1)) return "From, to and every must be whole numbers from 1.";
    if (b < a) return `From ${a} to ${b} is no stretch: to must not come before from.`;
    if (b > player.steps) return `There are ${player.steps} ${word}s so far; to must not be more.`;
    const steps = Array.from({ length: Math.floor((b - a) / n) + 1 }, (_, i) => a - 1 + i * n);
    if (steps.length > MOST_FRAMES) return `That is ${steps.length} frames; ${MOST_FRAMES} fit. Take every ${Math.ceil((b - a + 1) / MOST_FRAMES)}.`;
    return steps;
  };

  const tell = () => {
    const steps = wanted();
    say(length, typeof steps === "string" ? steps : `${steps.length} frame${steps.length > 1 ? "s" : ""}, ${(steps.length / Number(rate.value)).toFixed(1)} s`);
    film.disabled = typeof steps === "string" && !filming;
  };

  const trouble = (error) => {
    reportError(error);
    say(status, "This browser could not make the file.");
  };

  async function picture(kind) {
    try {
      const made = await camera[kind](player.step);
      const data = typeof made === "string" ? new TextEncoder().encode(made) : made;
      const name = file(kind);
      save({ name, mime: kind === "svg" ? "image/svg+xml" : "image/png", data });
      say(status, `Saved as ${name}.`);
    } catch (error) {
      trouble(error);
    }
  }

  async function shoot() {
    const steps = wanted();
    if (typeof steps === "string") return;
    player.pause();
    filming = true;
    say(film, "Cancel");
    try {
      const data = await camera.gif(steps, Number(rate.value), (i, of) => (say(status, `Frame ${i + 1} of ${of} …`), filming), () => player.step);
      const name = `leanscope-${lesson.slug}-${page.name() || "scene"}-${word}-${steps[0] + 1}-${steps[steps.length - 1] + 1}.gif`.replace(/[^\w.-]+/g, "-");
      if (data) save({ name, mime: "image/gif", data });
      say(status, data ? `Saved as ${name}.` : "Given up; nothing was saved.");
    } catch (error) {
      trouble(error);
    } finally {
      filming = false;
      say(film, "GIF");
      player.redraw();
    }
  }

  function download(what) {
    if (page.away()) return say(status, "The server is away, and this file comes from it.");
    say(status, "");
    return send({ type: "download", what });
  }

  async function copy() {
    try {
      await navigator.clipboard.writeText(link.value);
      say(status, "Link copied.");
    } catch {
      link.focus();
      say(status, "Copy it from the field with Ctrl+C.");
    }
  }

  /** The address of this page at this state; one too long for a link goes without it, and says so. */
  const address = () => {
    const url = new URL(location.href);
    const place = page.place();
    const token = tokenOf(place, defaults);
    const plain = !place.beat && !place.step && Object.entries(place.knobs).every(([name, value]) => value === defaults[name]);
    url.searchParams.delete("s");
    if (token) url.searchParams.set("s", token);
    else if (!plain) say(status, "A text is too long for a link: it leads to this page at its defaults.");
    return url.href;
  };

  return {
    element: dialog,
    offer: {
      label: "Take away",
      title: "The picture, an animation, the tensors, the claims, a link",
      act() {
        say(status, "");
        say(here, `The scene as it is now, ${word} ${player.step + 1} of ${player.steps}.`);
        for (const input of [from, to]) input.max = player.steps;
        to.value = String(player.steps);
        every.value = String(Math.max(1, Math.ceil(player.steps / 120)));
        link.value = address();
        tell();
        dialog.showModal();
      },
    },
  };
}
