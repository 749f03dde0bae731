/** The Code tab: the engine's own source, its tapped lines marked, coloured by a small reader of Python made here. */
import { fill, make } from "./dom.js";

const WORDS = new Set(
  "and as assert async await break class continue def del elif else except finally for from global if import in is lambda nonlocal not or pass raise return try while with yield True False None self".split(" "),
);
const PART = /("""[\s\S]*?(?:"""|$)|[rbf]{0,2}"(?:\\.|[^"\\\n])*"?|[rbf]{0,2}'(?:\\.|[^'\\\n])*'?)|(#.*)|(\b\d[\w.]*)|(@?[A-Za-z_]\w*)|(\s+|.)/g;

export function createCode() {
  const element = make("div", { class: "code-page" }, make("p", { class: "waiting-text" }, "Reading the source …"));

  const show = (sources) => {
    fill(element, sources.map(listing));
  };
  return { element, show };
}

function listing({ name, file, line, text, taps }) {
  const tapped = new Set(taps);
  const lines = coloured(text.replace(/\n$/, ""));
  const rows = lines.map((parts, i) =>
    make("span", { class: `code-line${tapped.has(line + i) ? " tapped" : ""}` }, make("span", { class: "line-number", "aria-hidden": "true" }, String(line + i)), make("span", {}, parts), "\n"),
  );
  const marked = tapped.size ? `${tapped.size} marked ${tapped.size === 1 ? "line hands" : "lines hand"} tensors to this page` : "";
  return make(
    "figure",
    { class: "listing" },
    make("figcaption", {}, make("strong", {}, name), make("span", { class: "file" }, `${file}:${line}`), make("span", { class: "tap-note" }, marked)),
    make("pre", { tabindex: 0, "aria-label": `Source of ${name}` }, make("code", {}, rows)),
  );
}

/** Lines of nodes. A docstring may run over several lines, so the text is read as a whole and then cut. */
function coloured(text) {
  const lines = [[]];
  let before = "";
  for (const [all, string, comment, number, word] of text.matchAll(PART)) {
    const kind = kindOf({ string, comment, number, word, before });
    all.split("\n").forEach((part, i) => {
      if (i) lines.push([]);
      if (part) lines[lines.length - 1].push(kind ? make("span", { class: `py-${kind}` }, part) : part);
    });
    if (all.trim()) before = all;
  }
  return lines;
}

function kindOf({ string, comment, number, word, before }) {
  if (string) return "string";
  if (comment) return "comment";
  if (number) return "number";
  if (!word) return "";
  if (word.startsWith("@")) return "name";
  if (WORDS.has(word)) return "word";
  if (before === "def" || before === "class") return "name";
  return word === "tap" || word === "event" ? "tap" : "";
}
