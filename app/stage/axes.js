/** Scales and ticks of Curves: linear or logarithmic, with round numbers at the ticks. */
import { format } from "./text.js";

/** A function from value to pixel, with `invert`, `low`, `high` and `ticks(count)`. */
export function scaleOf(low, high, from, to, log = false, roomy = false) {
  const forward = log ? Math.log : (v) => v;
  const back = log ? Math.exp : (v) => v;
  let [a, b] = [forward(low), forward(high)];
  if (b - a < 1e-12) [a, b] = [a - 0.5, b + 0.5];
  const pad = roomy ? (b - a) * 0.06 : 0;
  [a, b] = [a - pad, b + pad];
  const scale = (value) => from + ((forward(value) - a) / (b - a)) * (to - from);
  scale.invert = (pixel) => back(a + ((pixel - from) / (to - from)) * (b - a));
  scale.ticks = (count) => (log ? logTicks(back(a), back(b), count) : ticks(a, b, count));
  return scale;
}

/** Round numbers between a and b: ones, twos and fives. */
function ticks(a, b, count) {
  const raw = (b - a) / Math.max(1, count);
  const size = 10 ** Math.floor(Math.log10(raw));
  const pace = [1, 2, 5, 10].map((n) => n * size).find((n) => n >= raw);
  const list = [];
  for (let n = Math.ceil(a / pace); n * pace <= b + 1e-9; n += 1) list.push(Number((n * pace).toPrecision(12)));
  return list;
}

/** On a logarithmic scale, doublings when the range is short and powers of ten when it is long. */
function logTicks(a, b, count) {
  const decades = powers(a, b, 10, 1);
  if (decades.length > 1 && b / a > 50) return decades.filter((_, i) => i % Math.ceil(decades.length / (count + 1)) === 0);
  const doubled = powers(a, b, 2, 10 ** Math.floor(Math.log10(a)));
  return doubled.length > 1 ? doubled : ticks(a, b, count);
}

function powers(a, b, base, unit) {
  const list = [];
  for (let n = Math.ceil(Math.log(a / unit) / Math.log(base) - 1e-9); unit * base ** n <= b * (1 + 1e-9); n += 1) {
    list.push(Number((unit * base ** n).toPrecision(12)));
  }
  return list;
}

function named(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return format(value, ".3s");
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  return String(Number(value.toPrecision(4))).replace("-", "−");
}

/** Grid lines, tick labels and the names of both axes. */
export function axis(pen, { x, y, width, height, margin, spec, context }) {
  const { role } = context.colours;
  pen.font = `10px ${context.fonts.mono}`;
  pen.lineWidth = 1;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (const tick of y.ticks(4)) {
    const at = Math.round(y(tick)) + 0.5;
    pen.strokeStyle = role("line");
    pen.beginPath();
    pen.moveTo(margin.left, at);
    pen.lineTo(width - margin.right, at);
    pen.stroke();
    pen.fillStyle = role("muted");
    pen.fillText(named(tick), margin.left - 6, at);
  }
  pen.textAlign = "center";
  pen.textBaseline = "top";
  const end = width - margin.right - (spec.x_label ? 12 + 6 * spec.x_label.length : 0);
  for (const tick of x.ticks(Math.max(2, Math.floor(width / 90)))) {
    if (x(tick) <= end) pen.fillText(named(tick), x(tick), height - margin.bottom + 7);
  }
  if (!spec.x_label) return;
  pen.font = `11px ${context.fonts.text}`;
  pen.textAlign = "right";
  pen.fillText(spec.x_label, width - margin.right, height - margin.bottom + 7);
}
