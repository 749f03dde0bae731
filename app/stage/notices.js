/** Plain sentences at the top of the page: what did not fit, what went wrong, and the server being away. */
import { make } from "./dom.js";

const NOTICES = 4;

export function createNotices() {
  const element = make("div", { class: "notices", role: "status", "aria-live": "polite" });
  const away = make("div", { class: "notice away", hidden: true });
  element.append(away);

  return {
    element,
    add(text, level = "info") {
      const same = [...element.querySelectorAll(".notice-text")].find((node) => node.textContent === text);
      if (same) return;
      const notice = make("div", { class: `notice ${level}` }, make("span", { class: "notice-text" }, text));
      notice.append(make("button", { type: "button", class: "icon-button", "aria-label": "Dismiss", on: { click: () => notice.remove() } }, "✕"));
      element.append(notice);
      const shown = element.querySelectorAll(".notice:not(.away)");
      if (shown.length > NOTICES) shown[0].remove();
    },
    /** What the last change provoked is settled: its complaints go. */
    clear() {
      element.querySelectorAll(".notice:not(.away)").forEach((node) => node.remove());
    },
    away() {
      away.replaceChildren("The server is away. What you have plays on.");
      away.hidden = false;
    },
    /** It answers again, with a new session: reloading takes up from the link. */
    back(reload) {
      away.replaceChildren("The server is back. ", make("button", { type: "button", class: "plain-button", on: { click: reload } }, "Take up again"));
      away.hidden = false;
    },
    here() {
      away.hidden = true;
    },
  };
}
