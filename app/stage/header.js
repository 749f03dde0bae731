/** The top line: the mark, where we are, the model, sharing, presenting, light and dark. */
import { draw, make, say } from "./dom.js";

/** The mark: three bars, sink gold, recent teal, query blue. Also assets/icons/leanscope.svg. */
export function mark() {
  const bar = (x, y, height, colour) => draw("rect", { x, y, width: 5, height, rx: 1.5, style: { fill: `var(--${colour})` } });
  return draw("svg", { class: "mark", viewBox: "0 0 22 22", "aria-hidden": "true" }, bar(1, 2, 19, "sink"), bar(8.5, 7, 14, "recent"), bar(16, 12, 9, "query"));
}

/** `tools`: what whoever presents has at hand. `more`: what a page offers besides, as [{label, title, act}]: one menu, so that the line stays short. */
export function createHeader({ lesson, home, models, theme, share, present, tools = null, more = [] }) {
  const themeButton = make("button", { type: "button", class: "plain-button theme-button" });
  const showTheme = () => {
    say(themeButton, { auto: "◐", light: "☀", dark: "☾" }[theme.choice]);
    const words = { auto: "as the system", light: "light", dark: "dark" }[theme.choice];
    themeButton.setAttribute("aria-label", `Theme: ${words}`);
    themeButton.title = `Theme: ${words}`;
  };
  themeButton.addEventListener("click", () => {
    theme.cycle();
    showTheme();
  });
  showTheme();
  const shareButton = make("button", { type: "button", class: "plain-button" }, "Share");
  shareButton.addEventListener("click", async () => {
    say(shareButton, (await copied(share())) ? "Link copied" : "Copy the address");
    setTimeout(() => say(shareButton, "Share"), 2000);
  });
  const presentButton = present && make("button", { type: "button", class: "plain-button present-button", "aria-pressed": String(present.on()) }, "Present");
  if (present) {
    presentButton.addEventListener("click", () => present.toggle());
    present.listen(() => presentButton.setAttribute("aria-pressed", String(present.on())));
  }
  return make(
    "header",
    { class: "top" },
    home === null ? make("span", { class: "brand" }, mark(), make("span", {}, "Leanscope")) : make("a", { class: "brand", href: home || "/", "aria-label": "Leanscope, all lessons" }, mark(), make("span", {}, "Leanscope")),
    lesson ? crumbs(lesson) : make("span", { class: "grow" }),
    models ? models.element : null,
    tools,
    make("div", { class: "top-buttons" }, lesson && home !== null ? shareButton : null, home !== null ? presentButton : null, more.length ? moreMenu(more) : null, themeButton),
  );
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

/** Part › lesson; the lesson's name opens the list of all. */
function crumbs(lesson) {
  const items = (lesson.lessons || []).map((other) =>
    make("li", {}, make("a", { href: other.href, "aria-current": other.slug === lesson.slug ? "page" : null }, make("span", { class: "order" }, String(other.order)), other.title)),
  );
  const here = make("summary", {}, make("strong", {}, lesson.title || lesson.slug));
  const menu = items.length > 1 ? closing(make("details", { class: "menu" }, here, make("ul", {}, items))) : make("strong", {}, lesson.title || lesson.slug);
  return make("nav", { class: "crumbs grow", "aria-label": "Where you are" }, make("span", { class: "crumb-part" }, lesson.part), make("span", { class: "arrow", "aria-hidden": "true" }, "›"), menu);
}

function moreMenu(items) {
  const summary = make("summary", { class: "plain-button" }, "More");
  const menu = make("details", { class: "menu more" }, summary);
  const row = ({ label, title, act }) => {
    const chosen = () => {
      menu.open = false;
      summary.focus();
      act();
    };
    return make("li", {}, make("button", { type: "button", title: title || "", on: { click: chosen } }, label));
  };
  menu.append(make("ul", {}, items.map(row)));
  return closing(menu);
}

/** A menu that closes with Escape, and when the focus or a click goes elsewhere. */
function closing(details) {
  const close = () => {
    details.open = false;
  };
  details.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !details.open) return;
    close();
    details.querySelector("summary").focus();
  });
  details.addEventListener("focusout", (event) => {
    if (event.relatedTarget && !details.contains(event.relatedTarget)) close();
  });
  document.addEventListener("pointerdown", (event) => {
    if (!event.composedPath().includes(details)) close();
  });
  return details;
}
