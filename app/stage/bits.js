/**
 * A number as formats store it, bit by bit: sign, exponent, mantissa, each in its colour, each to be turned over. The
 * bits come from the engine; a flipped row goes back to it as text, "fp16 0100001100000101".
 */
import { make, say } from "./dom.js";
import { format, short } from "./text.js";

const FIELDS = { sign: "alarm", exponent: "key", mantissa: "query", magnitude: "value", place: "recomputed" };
const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";

/** A whole number as an exponent. */
export function raised(n) {
  return (n < 0 ? "⁻" : "") + [...String(Math.abs(n))].map((digit) => SUPERSCRIPTS[Number(digit)]).join("");
}

export function bitRows(host, spec, context) {
  const { store } = context;
  const legend = make("div", { class: "legend bits-legend" }, Object.entries(FIELDS).map(([name, colour]) => make("span", { class: `key fill-${colour}` }, make("span", { class: "key-text" }, name))));
  const rows = spec.rows.map((row) => build(row));
  const list = make("div", { class: "bits" }, rows.map((row) => row.node));
  host.append(list, context.bare ? "" : legend);
  let step = 0;

  function build(row) {
    const value = make("div", { class: "bits-value" });
    const sum = make("div", { class: "bits-sum" });
    const group = make("div", { class: "bits-row", role: "group" });
    const bits = row.fields.flatMap(([field, count]) =>
      Array.from({ length: count }, (_, n) => {
        const button = make("button", { type: "button", class: `bit fill-${FIELDS[field]}${n === count - 1 ? " bit-last" : ""}`, tabindex: -1 });
        return { field, button };
      }),
    );
    bits.forEach(({ button }, n) => {
      button.addEventListener("click", () => flip(row, n));
      button.addEventListener("keydown", (event) => rove(event, bits, n));
    });
    if (!context.bare) bits[0].button.tabIndex = 0;
    group.append(...bits.map(({ button }) => button));
    const name = make("div", { class: "bits-name" }, make("strong", {}, row.label), make("span", {}, row.detail));
    return { row, bits, group, value, sum, node: make("div", { class: "bits-format" }, name, make("div", { class: "bits-middle" }, group, sum), value) };
  }

  const read = ({ row }) => {
    const bits = store.newest(row.bits, step);
    const value = store.newest(row.value, step);
    return bits && value ? { bits, value: value[0] } : null;
  };

  const flip = (row, n) => {
    const bits = store.newest(row.bits, step);
    if (!bits || !spec.turn) return;
    context.turn(spec.turn.knob, `${row.form} ${bits.map((bit, i) => (i === n ? 1 - bit : bit)).join("")}`);
  };

  /** One stop of the tab key a row; the arrows go from bit to bit. */
  const rove = (event, bits, n) => {
    const to = { ArrowLeft: n - 1, ArrowRight: n + 1, Home: 0, End: bits.length - 1 }[event.key];
    if (to === undefined || !bits[to]) return;
    event.preventDefault();
    event.stopPropagation();
    bits[n].button.tabIndex = -1;
    bits[to].button.tabIndex = 0;
    bits[to].button.focus();
  };

  /** What the fields say, as a sum with their numbers. */
  const sumOf = ({ row }, bits) => {
    const number = (field) => {
      let at = 0;
      for (const [name, count] of row.fields) {
        if (name === field) return bits.slice(at, at + count).reduce((sum, bit) => 2 * sum + bit, 0);
        at += count;
      }
      return 0;
    };
    const count = (field) => (row.fields.find(([name]) => name === field) || [0, 0])[1];
    if (count("place")) return `level ${number("place")} of ${2 ** count("place")}`;
    if (count("magnitude")) return `${number("sign") ? `−${2 ** count("magnitude")}` : "0"} + ${number("magnitude")}`;
    const [e, m] = [number("exponent"), count("mantissa")];
    const special = row.infinite ? e === 2 ** count("exponent") - 1 : e === 2 ** count("exponent") - 1 && number("mantissa") === 2 ** m - 1;
    if (special) return row.infinite && number("mantissa") === 0 ? "all exponent bits set, mantissa 0: infinity" : "a pattern that is no number";
    const sign = number("sign") ? "−" : "+";
    const fraction = `${number("mantissa").toLocaleString("en-US")}⁄${(2 ** m).toLocaleString("en-US")}`;
    return e ? `${sign} 2${raised(e - row.bias)} · (1 + ${fraction})` : `${sign} 2${raised(1 - row.bias)} · ${fraction}`;
  };

  const told = (value) => (Number.isNaN(value) ? "not a number" : Number.isFinite(value) ? short7(value) : format(value));

  return {
    draw(now) {
      step = now;
      let drawn = false;
      for (const entry of rows) {
        const seen = read(entry);
        if (!seen) continue;
        drawn = true;
        entry.bits.forEach(({ field, button }, n) => {
          const bit = seen.bits[n];
          say(button, String(bit));
          button.classList.toggle("bit-on", Boolean(bit));
          button.setAttribute("aria-label", `${entry.row.label}, bit ${seen.bits.length - 1 - n}, ${field}: ${bit}. Flip it.`);
        });
        const off = (store.newest(entry.row.off, step) || [NaN])[0];
        const exact = off === 0;
        entry.value.replaceChildren(make("strong", {}, told(seen.value)), make("span", { class: exact ? "bits-exact" : "bits-off" }, exact ? "exact" : Number.isFinite(off) ? `off by ${short(Math.abs(off))}` : "does not fit"));
        say(entry.sum, sumOf(entry, seen.bits));
        entry.group.setAttribute("aria-label", `${entry.row.label}: ${told(seen.value)}. Arrow keys go from bit to bit, Enter flips one.`);
      }
      return drawn;
    },
    resize() {},
    dispose() {
      list.remove();
      legend.remove();
    },
    table: () => ({
      columns: ["format", "bits", "value"],
      rows: rows.map((entry) => [entry, read(entry)]).filter(([, seen]) => seen).map(([entry, seen]) => [entry.row.label, seen.bits.join(""), told(seen.value)]),
    }),
  };
}

/** Seven figures: as many as a 32-bit number has. */
function short7(value) {
  const size = Math.abs(value);
  if (value === 0) return Object.is(value, -0) ? "−0" : "0";
  const text = size >= 1e7 || size < 1e-4 ? value.toExponential(3).replace("e+", "e") : String(Number(value.toPrecision(7)));
  return text.replaceAll("-", "−");
}
