/**
 * What several models say, one below the other, word by word: the words of the first are the measure, and where another
 * says something else, that word is set off. Figures stand beside each.
 */
import { make, say } from "./dom.js";
import { format, visible } from "./text.js";

const MARKS = /^[.,;:!?]$/; // stand close to the word before

export function sayings(host, spec, context) {
  const { store } = context;
  const prompt = make("p", { class: "sayings-prompt" });
  const list = make("div", { class: "sayings" });
  host.append(spec.prompt && !context.bare ? prompt : "", list);
  const rows = spec.sayings.map((saying, i) => createSaying(list, saying, i, context));
  let step = 0;
  let shown = "";

  const word = (id) => (store.words.has(id) ? visible(store.words.get(id)) : `#${id}`);
  const idsAt = ({ ids }) => {
    const track = store.of(ids);
    return Array.from({ length: track ? track.countAt(step) : 0 }, (_, r) => track.scalar(r));
  };
  const read = () => spec.sayings.map((saying) => idsAt(saying).map(word));
  /** A tokenizer of whole words keeps no blanks: the gaps between its words are ours. */
  const wordsAlone = () => ![...store.words.values()].some((piece) => /^\s|\s$/.test(piece));
  const joined = (words, alone) => words.reduce((text, next) => text + (alone && text && !MARKS.test(next) ? " " : "") + next, "");

  const draw = (now) => {
    step = now;
    const said = read();
    const alone = wordsAlone();
    const wanted = JSON.stringify([said, alone, context.theme]);
    if (wanted !== shown) {
      shown = wanted;
      const asked = spec.prompt ? (store.newest(spec.prompt, step) || []).map(word) : [];
      say(prompt, joined(asked, alone));
      rows.forEach((row, i) => row.write(said[i], said[0], alone));
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
    write(words, first, alone) {
      const differs = words.filter((word, n) => place > 0 && word !== first[n]).length;
      text.replaceChildren(...words.map((word, n) => {
        const other = place > 0 && word !== first[n];
        const newest = n === words.length - 1;
        const gap = alone && n > 0 && !MARKS.test(word) ? " " : "";
        return make("span", {}, gap, make("span", { class: `saying-word${other ? " other" : ""}${newest ? " newest" : ""}` }, word));
      }));
      row.setAttribute("aria-label", `${saying.label} says: ${words.join(" ") || "nothing yet"}${differs ? `; ${differs} words differ from the first` : ""}`);
    },
    figure(step) {
      values.forEach(({ number, value }) => say(value, valueAt(store, number, step)));
      return values.some(({ number }) => store.of(number.tensor));
    },
  };
}
