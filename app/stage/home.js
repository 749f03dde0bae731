/** The index: the course as nine parts, each lesson with its question; those that exist are links with a live picture. */
import { palette } from "./colours.js";
import { make } from "./dom.js";
import { glyph } from "./glyphs.js";
import { createHeader, mark } from "./header.js";
import { createPreview } from "./preview.js";
import { roomDoor } from "./roombar.js";

export function homePage({ root, model, places, theme }) {
  const course = model.get("course") || [];
  const base = { colours: palette(root), theme: `${root.dataset.theme} 0` };
  const previews = [];
  const lessons = course.flatMap((part) => part.lessons);
  const ready = lessons.filter((lesson) => lesson.href);
  let order = 0;

  const card = (lesson) => {
    order += 1;
    const number = make("span", { class: "card-number" }, String(order));
    if (!lesson.href) {
      return make("li", { class: "card-coming" }, number, make("div", {}, make("h3", {}, lesson.title), make("p", {}, lesson.question)), make("span", { class: "soon" }, lesson.soon || "not here"));
    }
    const picture = make("div", { class: "card-picture", "aria-hidden": "true" });
    if (lesson.preview) previews.push(createPreview(picture, lesson.preview, base));
    else picture.append(glyph(partOf(lesson)));
    const text = make("div", { class: "card-text" }, make("div", { class: "card-line" }, number, make("h3", {}, lesson.title)), make("p", {}, lesson.question), make("span", { class: "card-go", "aria-hidden": "true" }, "Open the lesson →"));
    return make("li", { class: "card-open" }, make("a", { href: lesson.href, "aria-label": `${lesson.title}: ${lesson.question}` }, picture, text));
  };

  const partOf = (lesson) => course.findIndex((part) => part.lessons.includes(lesson));

  const section = (part, i) =>
    make(
      "section",
      { class: "part", "aria-label": part.part },
      make("div", { class: "part-head" }, glyph(i), make("p", { class: "kicker" }, `Part ${i + 1}`), make("h2", {}, part.part)),
      make("ol", { class: "part-lessons" }, part.lessons.map(card)),
    );

  const hero = make(
    "div",
    { class: "hero" },
    make("div", { class: "hero-text" }, make("h1", {}, "See how language models are made cheap to run."), make("p", { class: "hero-lede" }, "A small, real engine runs every technique, and each page draws the engine’s own tensors as they are made. Guess first, turn a knob, read the arithmetic of any cell."), promises()),
    heroPicture(lessons.find((lesson) => lesson.preview), base, previews),
  );

  root.classList.add("home");
  root.append(
    createHeader({ lesson: null, home: places.home, models: null, theme, present: null, share: () => location.href }),
    make("main", {}, hero, make("p", { class: "count" }, ready.length === lessons.length ? `${lessons.length} lessons, one after the other or as you like.` : `${ready.length} of ${lessons.length} lessons are in this copy.`), roomDoor(places.rooms), make("div", { class: "parts" }, course.map(section))),
  );
  previews.forEach((preview) => preview.start());
  Object.defineProperty(window, "leanscope", {
    configurable: true,
    value: Object.freeze({
      get lesson() {
        return "";
      },
      get ready() {
        return previews.every((preview) => preview.drawn);
      },
      get frames() {
        return previews.reduce((sum, preview) => sum + preview.frames, 0);
      },
    }),
  });

  return {
    themed() {
      base.colours = palette(root);
      base.theme = `${root.dataset.theme} ${performance.now()}`;
      previews.forEach((preview) => preview.redraw());
    },
    stop: () => previews.forEach((preview) => preview.stop()),
  };
}

/** The first lesson that has one lends its picture, drawn large; before there is any, the mark stands in. */
function heroPicture(lesson, base, previews) {
  const box = make("div", { class: "hero-picture" });
  if (!lesson) {
    box.append(mark());
    return box;
  }
  const host = make("div", {});
  const preview = createPreview(host, lesson.preview, base, { single: true, height: 330 });
  previews.push(preview);
  box.append(make("a", { href: lesson.href, "aria-label": `${lesson.title}: ${lesson.question}` }, host, make("span", { class: "hero-caption" }, preview.caption)));
  return box;
}

function promises() {
  const list = [
    ["True", "every number on a page was measured while the page ran, or is quoted with its source"],
    ["Real", "each technique runs on a toy that you can read whole, and on a real language model"],
    ["Alive", "turn a knob and the engine runs again; scrub, step, play"],
  ];
  return make("dl", { class: "promises" }, list.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text))));
}
