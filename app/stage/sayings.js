/**
 * What several models say, one below the other, word by word: the words of the first are the measure, and where another
 * says something else, that word is set off; or, where some are given, those that are looked for. Figures stand beside
 * each.
 */
import { make, say } from "./dom.js";
import { format } from "./text.js";

const MARKS = /^[.,;:!?]$/; // stand close to the word before

export function sayings(host, spec, context) {
  const { store } = context;
  const prompt = make("p", { class: "sayings-prompt" });
  const list = make("div", { class: `sayings ${spec.abreast ? "abreast" : ""}` });
  host.append(spec.prompt && !context.bare ? prompt : "", list);
  const rows = spec.sayings.map((saying, i) => createSaying(list, saying, i, context));
  let step = 0;
  let shown = "";

  /** A piece as it is, blanks and all: of a tokenizer of pieces they are the gaps between words. */
  const word = (id) => (store.words.has(id) ? store.words.get(id).replace(/\n/g, "⏎") : `#${id}`);
  /** Word after word, one a step; or the newest row, where a row holds a whole text. */
  const idsAt = ({ ids }) => {
    const track = store.of(ids);
    if (!track) return [];
    if (track.row(0).shape.length) return store.newest(ids, step) || [];
    return Array.from({ length: track.countAt(step) }, (_, r) => track.scalar(r));
  };
  const read = () => spec.sayings.map((saying) => idsAt(saying).map(word));
  const marked = () => (spec.marked ? (store.newest(spec.marked, step) || []).map(word) : null);
  /** A tokenizer of whole words keeps no blanks: the gaps between its words are ours. */
  const wordsAlone = () => ![...store.words.values()].some((piece) => /^\s|\s$/.test(piece));
  const joined = (words, alone) => words.reduce((text, next) => text + (alone && text && !MARKS.test(next) ? " " : "") + next, "");

  const draw = (now) => {
    step = now;
    const said = read();
    const alone = wordsAlone();
    const sought = marked();
    const wanted = JSON.stringify([said, sought, alone, context.theme]);
    if (wanted !== shown) {
      shown = wanted;
      const asked = spec.prompt ? (store.newest(spec.prompt, step) || []).map(word) : [];
      say(prompt, joined(asked, alone));
      rows.forEach((row, i) => row.write(said[i], said[0], alone, sought));
    }
    return rows.map((row) => row.figure(step)).some(Boolean) || said.some((words) => words.length > 0);
  };

  return {
    draw,
    resize() {},
    dispose() {
      prompt.remove();
      list.remove();
    },
    table() {
      const said = read();
      const alone = wordsAlone();
      const labels = [...new Set(spec.sayings.flatMap(({ figures }) => figures.map(({ label }) => label)))];
      const figureOf = (saying, label) => {
        const number = saying.figures.find((figure) => figure.label === label);
        return number ? valueAt(store, number, step) : "";
      };
      return {
        columns: ["who", "says", ...labels],
        rows: spec.sayings.map((saying, i) => [saying.label, joined(said[i], alone), ...labels.map((label) => figureOf(saying, label))]),
      };
    },
  };
}

function valueAt(store, number, step) {
  const track = store.of(number.tensor);
  const value = track ? track.scalarAt(step) : null;
  if (Number.isNaN(value)) return "–"; // no number: nothing to tell
  return value === null ? "…" : `${format(value, number.format)}${number.unit ? ` ${number.unit}` : ""}`;
}

function createSaying(list, saying, place, { store }) {
  const text = make("div", { class: "saying-words" });
  const values = saying.figures.map((number) => {
    const value = make("span", { class: "saying-value" });
    return { number, value, node: make("div", { class: "saying-figure" }, value, make("span", { class: "small" }, number.label)) };
  });
  const row = make("div", { class: "saying", role: "group" },
    make("div", { class: `saying-name ink-${saying.colour}` }, saying.label, saying.detail ? make("span", { class: "small" }, saying.detail) : null),
    text,
    make("div", { class: "saying-figures" }, values.map(({ node }) => node)));
  list.append(row);

  return {
    write(words, first, alone, sought) {
      const differs = sought ? 0 : words.filter((word, n) => place > 0 && word !== first[n]).length;
      const parts = sought || place === 0 ? -1 : words.findIndex((word, n) => word !== first[n]);
      const found = sought ? words.filter((word) => sought.includes(word)).length : 0;
      text.replaceChildren(...words.map((word, n) => {
        const other = !sought && place > 0 && word !== first[n];
        const newest = !sought && n === words.length - 1;
        const gap = alone && n > 0 && !MARKS.test(word) ? " " : "";
        return make("span", {}, gap, make("span", { class: `saying-word${other ? " other" : ""}${n === parts ? " parts" : ""}${newest ? " newest" : ""}${sought?.includes(word) ? " sought" : ""}` }, word));
      }));
      row.setAttribute("aria-label", `${saying.label} says: ${words.join(" ") || "nothing yet"}${differs ? `; ${differs} words differ from the first, from word ${parts + 1} on` : ""}${found ? `; ${found} of the words looked for` : ""}`);
    },
    figure(step) {
      values.forEach(({ number, value }) => say(value, valueAt(store, number, step)));
      return values.some(({ number }) => store.of(number.tensor));
    },
  };
}
