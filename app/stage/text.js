/**
 * Numbers and words: Python-like formats (".1f", ",.0f", ".0%"), and the small markup of beats, turned into
 * elements (never into HTML).
 */
import { make, say } from "./dom.js";

const FORMAT = /^(\+)?(,)?(?:\.(\d+))?([fdeg%s])?$/;
const STEPS = ["", "k", "M", "G", "T", "P"];

/** `value` as Python's format(value, spec) would write it, for the specs that lessons use. */
export function format(value, spec = "") {
  if (value === null || value === undefined) return "…";
  if (typeof value !== "number") return String(value);
  if (Number.isNaN(value)) return "nan";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const [, plus, comma, digits, type] = FORMAT.exec(spec) || [];
  const sign = plus && value > 0 ? "+" : "";
  return (sign + digitsOf(value, comma, digits, type)).replace("-", "−");
}

function digitsOf(value, comma, digits, type) {
  const places = digits === undefined ? 6 : Number(digits);
  const grouped = (x, n) =>
    x.toLocaleString("en-US", { minimumFractionDigits: n, maximumFractionDigits: n, useGrouping: Boolean(comma) });
  if (type === "%") return `${grouped(value * 100, places)}%`;
  if (type === "f") return grouped(value, places);
  if (type === "d") return grouped(Math.round(value), 0);
  if (type === "e") return value.toExponential(places);
  if (type === "s") return scaled(value, places);
  if (type === "g") return String(Number(value.toPrecision(Math.max(1, places))));
  if (digits !== undefined) return grouped(value, places);
  if (Number.isInteger(value)) return grouped(value, 0);
  return short(value);
}

/** 12,500,000 as 12.5M: so many figures and a thousand's letter. */
function scaled(value, figures) {
  const step = value === 0 ? 0 : Math.min(STEPS.length - 1, Math.max(0, Math.floor(Math.log10(Math.abs(value)) / 3)));
  return `${Number((value / 1000 ** step).toPrecision(Math.max(1, figures)))}${STEPS[step]}`;
}

/** A number for a read-out: four figures, however large or small. */
export function short(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (!Number.isFinite(value)) return format(value);
  const text = size >= 1e6 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  return text.replace("-", "−");
}

/** Bytes for people. */
export function bytes(count) {
  if (count < 1000) return `${count} B`;
  const [scale, unit] = count < 1e6 ? [1e3, "kB"] : count < 1e9 ? [1e6, "MB"] : [1e9, "GB"];
  return `${(count / scale).toFixed(count / scale < 10 ? 1 : 0)} ${unit}`;
}

/** A token as it may be shown alone: blanks and line breaks made visible. */
export function visible(piece) {
  if (piece === undefined || piece === null) return "";
  if (/^ +$/.test(piece)) return "␣".repeat(piece.length);
  return piece.replace(/\n/g, "⏎").replace(/\t/g, "⇥").trim();
}

const MARKUP = /\*\*(.+?)\*\*|\*(.+?)\*|\[\[(.+?)\]\]|==(.+?)\|([\w-]+)==|\{(\w+)(?::([^}]*))?\}/gs;

/**
 * A beat's text as paragraphs. `hooks`: term(shown, key) and light(nodes, view) make the elements for [[term]] and
 * ==words|view==. Returns {nodes, fill(facts)}: numbers stand as "…" until `fill` is given them.
 */
export function rich(text, hooks) {
  const facts = [];
  const inline = (source) => {
    const nodes = [];
    let end = 0;
    for (const match of source.matchAll(MARKUP)) {
      const [all, strong, em, term, words, view, fact, spec] = match;
      nodes.push(source.slice(end, match.index));
      end = match.index + all.length;
      if (strong) nodes.push(make("strong", {}, inline(strong)));
      else if (em) nodes.push(make("em", {}, inline(em)));
      else if (term) nodes.push(hooks.term(...shownAndKey(term)));
      else if (words) nodes.push(hooks.light(inline(words), view));
      else {
        const node = make("span", { class: "fact" }, "…");
        facts.push({ node, name: fact, spec });
        nodes.push(node);
      }
    }
    nodes.push(source.slice(end));
    return nodes.filter((node) => node !== "");
  };
  const nodes = text
    .trim()
    .split(/\n\s*\n/)
    .map((paragraph) => make("p", {}, inline(paragraph.replace(/\s*\n\s*/g, " "))));
  const fillIn = (known) => {
    for (const { node, name, spec } of facts) {
      const there = name in known;
      say(node, there ? format(known[name], spec) : "…");
      node.classList.toggle("waiting", !there);
    }
  };
  return { nodes, fill: fillIn };
}

function shownAndKey(term) {
  const [shown, key] = term.split("|");
  return [shown, key || shown];
}
