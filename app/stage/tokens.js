/**
 * The text as it is read: a chip a token, coloured by what became of it or by a value. Long stretches that were evicted
 * hide behind an ellipsis, the token being read is set off, and the panel keeps it in sight.
 */
import { css, wantsDarkInk } from "./colours.js";
import { make } from "./dom.js";
import { short } from "./text.js";

const AHEAD = 4; // tokens still to come that are shown, faintly
const FOLD = 6; // shorter evicted stretches stay

export function tokens(host, spec, context) {
  const { store } = context;
  const text = make("div", { class: "tokens", tabindex: context.bare ? null : 0, role: "group", "aria-label": spec.title || "The text" });
  host.append(text);
  let chips = [];
  let looks = [];
  let step = 0;

  /** Chips for tokens that have none yet. A line break ends the line after its mark. */
  const grow = () => {
    for (let n = chips.length; n < store.pieces.length; n += 1) {
      const piece = store.pieces[n];
      const chip = make("span", { class: "chip" }, piece.replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅");
      chip.addEventListener("pointermove", (event) => context.tip.near(event, lines(n)));
      chip.addEventListener("pointerleave", () => context.tip.hide());
      const fold = make("span", { class: "fold", hidden: true, "aria-hidden": "true" }, "···");
      chips.push({ chip, fold });
      looks.push("");
      text.append(fold, chip);
      if (/\n/.test(piece)) text.append(make("br"));
    }
    // A tokenizer of whole words keeps no blanks: the gaps between its words are ours.
    text.classList.toggle("words", store.pieces.length > 1 && !store.pieces.some((piece) => /^\s|\s$/.test(piece)));
  };

  const lines = (n) => {
    const values = valueOf(n);
    const state = codesAt(step);
    return [
      `token ${n}`,
      ...(state && n < state.length ? [spec.states[state[n]]] : []),
      ...(values === null ? [] : [`${spec.value_label || "value"} ${short(values)}`]),
    ];
  };

  const codesAt = (now) => store.sent(spec.codes, now);

  const valueOf = (n) => {
    const track = spec.value ? store.of(spec.value) : null;
    return track && n < track.countAt(step) ? track.scalar(n) : null;
  };

  const paint = (n, codes, current) => {
    if (n > current) return "coming";
    if (n === current) return "current";
    if (codes) return `state-${spec.states[codes[n]] || "empty"}`;
    return valueOf(n) === null ? "read" : "valued";
  };

  const dress = (n, look) => {
    const { chip } = chips[n];
    if (looks[n] === look && look !== "valued") return;
    looks[n] = look;
    chip.className = `chip ${look}`;
    chip.style.removeProperty("background");
    chip.style.removeProperty("color");
    if (look !== "valued") return;
    const track = store.of(spec.value);
    const [low, high] = track.range();
    const share = high > low ? (valueOf(n) - low) / (high - low) : 0;
    const packed = context.colours.scale(spec.colours)[Math.round(255 * Math.min(1, Math.max(0, share)))];
    chip.style.background = css(packed);
    chip.style.color = wantsDarkInk(packed) ? "#1B1F24" : "#FFFFFF";
  };

  /** Hide evicted stretches behind one ellipsis each. */
  const fold = (codes, current) => {
    const gone = (n) => spec.fold && codes && n < current && spec.states[codes[n]] === "evicted";
    for (let n = 0; n < chips.length; ) {
      let end = n;
      while (end < chips.length && gone(end)) end += 1;
      const hide = end - n > FOLD;
      const to = Math.max(end, n + 1);
      for (let k = n; k < to; k += 1) {
        chips[k].chip.hidden = hide || k > current + AHEAD;
        chips[k].fold.hidden = !(hide && k === n);
      }
      n = to;
    }
  };

  const follow = (current) => {
    const chip = chips[current].chip;
    const top = chip.offsetTop;
    if (top < text.scrollTop || top + chip.offsetHeight > text.scrollTop + text.clientHeight) {
      text.scrollTop = Math.max(0, top - text.clientHeight + 2.3 * chip.offsetHeight);
    }
  };

  const draw = (now) => {
    step = now;
    if (!store.pieces.length) return false;
    grow();
    const current = Math.max(0, store.piecesAt(step) - 1);
    const codes = codesAt(step);
    for (let n = 0; n < chips.length; n += 1) dress(n, paint(n, codes, current));
    fold(codes, current);
    follow(current);
    return true;
  };

  return {
    draw,
    resize() {
      looks = looks.map(() => "");
      draw(step);
    },
    dispose() {
      text.remove();
    },
    table() {
      const codes = codesAt(step);
      const known = store.piecesAt(step);
      const rows = store.pieces.slice(0, known).map((piece, n) => {
        const value = valueOf(n);
        return [n, JSON.stringify(piece), codes ? spec.states[codes[n]] || "" : "", value === null ? "" : short(value)];
      });
      return { columns: ["token", "text", "state", spec.value_label || "value"], rows };
    },
  };
}
