/** A small sign for each of the nine parts, drawn from rectangles in the colours of what the part is about. */
import { draw } from "./dom.js";

const block = (x, y, width, height, colour, more = {}) => draw("rect", { x, y, width, height, rx: 1.2, style: { fill: `var(--${colour})` }, ...more });

const row = (colours, y, size = 5, height = 8) => colours.map((colour, i) => block(2 + i * (size + 2), y, size, height, colour));

const SIGNS = [
  // Where the time goes: a clock's worth of short steps and one long wait.
  () => [block(2, 6, 8, 5, "query"), block(12, 6, 30, 5, "line"), block(2, 14, 26, 5, "key"), block(30, 14, 12, 5, "line"), block(2, 22, 14, 5, "value"), block(18, 22, 24, 5, "line")],
  // Share the cache: four readers, two notebooks.
  () => [...row(["query", "query", "query", "query"], 4, 8), block(2, 20, 18, 8, "key"), block(22, 20, 18, 8, "key")],
  // The same answer, computed better: tiles of a triangle, one at work.
  () => [0, 1, 2, 3].flatMap((i) => Array.from({ length: i + 1 }, (_, j) => block(8 + j * 8, 1 + i * 8, 6.5, 6.5, i === 2 && j === 1 ? "sink" : "line"))),
  // Keep the right things: sinks, a gap, the recent.
  () => row(["sink", "hatch", "hatch", "recent", "recent", "recent"], 8, 5, 16),
  // Fewer bits: a staircase.
  () => [0, 1, 2, 3, 4].map((i) => block(2 + i * 8, 26 - i * 5, 7, 4 + i * 5, i % 2 ? "recomputed" : "recent")),
  // Fewer weights at work: few of many.
  () => Array.from({ length: 18 }, (_, n) => block(3 + (n % 6) * 7, 4 + Math.floor(n / 6) * 9, 5, 6, [1, 8, 10, 17].includes(n) ? "heavy" : "line")),
  // Several tokens at a time: a branching guess.
  () => [block(2, 13, 7, 7, "ink"), block(14, 5, 7, 7, "value"), block(14, 21, 7, 7, "line"), block(26, 5, 7, 7, "value"), block(26, 15, 7, 7, "line"), block(37, 5, 5, 7, "value")],
  // Teach it cheaply: a thin pair beside a big square.
  () => [block(2, 4, 24, 24, "line"), block(30, 4, 3, 24, "key"), block(36, 4, 7, 3, "query")],
  // Put it together: blocks of all colours.
  () => [block(4, 18, 11, 10, "query"), block(17, 18, 11, 10, "key"), block(30, 18, 11, 10, "value"), block(10, 6, 11, 10, "sink"), block(23, 6, 11, 10, "recent")],
];

export function glyph(part) {
  return draw("svg", { class: "glyph", viewBox: "0 0 44 33", "aria-hidden": "true" }, (SIGNS[part] || SIGNS[8])());
}
