/** The floating read-out: a cell's value under the pointer, a glossary term's meaning. One for the whole page. */
import { fill, make } from "./dom.js";
import { enlargement } from "./glass.js";

export function createTip(root) {
  const box = make("div", { class: "tip", role: "tooltip", id: "leanscope-tip", hidden: true });
  root.append(box);

  const put = (x, y, above) => {
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const left = Math.max(8, Math.min(x, window.innerWidth - width - 8));
    const fits = above ? y - height - 8 > 0 : y + height + 8 < window.innerHeight;
    const top = (above ? fits : !fits) ? y - height - 10 : y + 14;
    box.style.left = `${left / enlargement()}px`;
    box.style.top = `${Math.max(8, top) / enlargement()}px`;
  };

  return {
    id: box.id,
    /** Show lines of text near the pointer; the first is set in bold. */
    near(event, lines) {
      fill(box, lines.map((line, i) => make(i ? "div" : "strong", {}, line)));
      box.classList.remove("wide");
      put(event.clientX + 14, event.clientY, false);
    },
    /** Explain a term under its word. */
    under(element, title, text) {
      fill(box, make("strong", {}, title), make("div", {}, text));
      box.classList.add("wide");
      const rect = element.getBoundingClientRect();
      put(rect.left, rect.bottom - 6, false);
    },
    hide() {
      box.hidden = true;
    },
  };
}
