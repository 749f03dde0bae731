/**
 * Lines with the player's cursor: what is past is drawn firmly, what is to come faintly. Both layers are drawn once for
 * the data there is; a frame only copies them, cut at the cursor.
 */
import { axis, scaleOf } from "./axes.js";
import { make, sized } from "./dom.js";
import { ratio, within } from "./glass.js";
import { format } from "./text.js";

const PLOT_HEIGHT = 150;
const MARGIN = { left: 38, right: 12, top: 10, bottom: 22 };

export function curves(host, spec, context) {
  const { store } = context;
  const canvas = make("canvas", { role: "img" });
  const wrap = make("div", { class: "canvas-wrap" }, canvas);
  const key = make("div", { class: "legend" }, spec.lines.map((line) =>
    make("span", { class: `key ${line.dashed ? "dashed" : "line"} ink-${line.colour} fill-${line.colour}` }, make("span", { class: "key-text" }, line.label))));
  host.append(wrap, context.bare ? "" : key);
  const firm = document.createElement("canvas");
  const faint = document.createElement("canvas");
  let state = "";
  let plot = null;
  let step = 0;

  const points = (line) => {
    const track = store.of(line.tensor);
    if (!track) return [];
    if (spec.across) {
      const xs = store.newest(line.x, step);
      return (store.newest(line.tensor, step) || []).map((y, i) => ({ x: xs ? xs[i] : i, y, at: -1 }));
    }
    const xs = line.x ? store.of(line.x) : null;
    const band = (line.band || []).map((end) => store.of(end));
    const all = [];
    for (let r = 0; r < track.count; r += 1) {
      const at = track.at[r];
      const ends = band.map((end) => (end && r < end.count ? end.scalar(r) : NaN));
      if (at >= spec.start) all.push({ x: xs && r < xs.count ? xs.scalar(r) : at, y: track.scalar(r), at, ends });
    }
    return all;
  };

  /** Draw both layers for the data there is. */
  const lay = () => {
    const lines = spec.lines.map((line) => ({ line, points: points(line).filter(({ y }) => Number.isFinite(y) && (!spec.log || y > 0)) }));
    const every = lines.flatMap((l) => l.points);
    if (!every.length) return null;
    const width = host.clientWidth;
    const height = context.height || spec.height || PLOT_HEIGHT;
    const margin = context.bare ? { left: 2, right: 6, top: 6, bottom: 4 } : MARGIN;
    const edge = (pick, values) => values.reduce((a, b) => pick(a, b));
    const xs = every.map((p) => p.x);
    const ahead = spec.across || lines.some((l) => l.line.x) ? 0 : store.ahead;
    const x = scaleOf(edge(Math.min, xs), edge(Math.max, xs) + ahead, margin.left, width - margin.right, spec.log_x);
    const ys = every.flatMap((p) => [p.y, ...(p.ends || [])]).filter((y) => Number.isFinite(y) && (!spec.log || y > 0));
    const y = scaleOf(spec.low ?? edge(Math.min, ys), spec.high ?? edge(Math.max, ys), height - margin.bottom, margin.top, spec.log, true);
    for (const [layer, alpha] of [[firm, 1], [faint, 0.28]]) {
      const pen = sized(layer, width, height);
      pen.clearRect(0, 0, width, height);
      pen.globalAlpha = alpha;
      for (const { line, points: list } of lines) trace(pen, list, x, y, line, context.colours);
      pen.globalAlpha = 1;
    }
    sized(canvas, width, height);
    return { lines, x, y, width, height, margin };
  };

  const draw = (now) => {
    step = now;
    const versions = spec.lines.map((line) => (store.of(line.tensor) || { version: 0 }).version).join();
    const wanted = `${versions} ${host.clientWidth} ${context.theme} ${store.total} ${store.steps} ${spec.across ? now : ""}`;
    if (wanted !== state && host.clientWidth) {
      state = wanted;
      plot = lay();
    }
    if (!plot) return waiting();
    paint();
    canvas.setAttribute("aria-label", describe());
    return true;
  };

  /** Nothing to draw yet: say when there will be. */
  const waiting = () => {
    const pen = sized(canvas, Math.max(1, host.clientWidth), context.height || spec.height || PLOT_HEIGHT);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.font = `13px ${context.fonts.text}`;
    pen.fillStyle = context.colours.role("muted");
    pen.textAlign = "center";
    const text = spec.start ? `starts at ${spec.x_label || "step"} ${spec.start + 1}` : "nothing yet";
    pen.fillText(text, host.clientWidth / 2, (spec.height || PLOT_HEIGHT) / 2);
    canvas.setAttribute("aria-label", `${spec.title || spec.y_label}: ${text}`);
    return false;
  };

  /** Where the line that moved last stands. */
  const cursorX = () => {
    const now = plot.lines.map((l) => newest(l.points, step)).filter(Boolean);
    return now.length ? plot.x(now.reduce((a, b) => (b.at > a.at ? b : a)).x) : plot.margin.left;
  };

  /** Lines with an x of their own may be drawn one after another over the same stretch: each is cut at its own end. */
  const paintEach = (pen) => {
    pen.drawImage(faint, 0, 0, plot.width, plot.height);
    for (const { line, points: list } of plot.lines) {
      const past = list.filter((p) => p.at <= step);
      if (past.length > 1) trace(pen, past, plot.x, plot.y, line, context.colours);
    }
    return marks(pen);
  };

  const paint = () => {
    const { width, height, margin, x, y } = plot;
    const pen = canvas.getContext("2d");
    const scale = ratio();
    pen.clearRect(0, 0, width, height);
    if (!context.bare) axis(pen, { x, y, width, height, margin, spec, context });
    if (spec.across) return pen.drawImage(firm, 0, 0, width, height);
    if (spec.lines.some((line) => line.x)) return paintEach(pen);
    const cut = Math.round(cursorX() * scale);
    const copy = (layer, from, to) => {
      if (to > from) pen.drawImage(layer, from, 0, to - from, layer.height, from / scale, 0, (to - from) / scale, height);
    };
    copy(firm, 0, cut);
    copy(faint, cut, faint.width);
    return marks(pen);
  };

  /** The cursor, and a dot on each line where it stands. */
  const marks = (pen) => {
    const { margin, height, x, y } = plot;
    const at = cursorX();
    pen.strokeStyle = context.colours.role("muted");
    pen.lineWidth = 1;
    pen.setLineDash([3, 3]);
    pen.beginPath();
    pen.moveTo(at, margin.top - 4);
    pen.lineTo(at, height - margin.bottom);
    pen.stroke();
    pen.setLineDash([]);
    for (const { line, points: list } of plot.lines) {
      const now = newest(list, step);
      if (!now) continue;
      pen.fillStyle = context.colours.role(line.colour);
      pen.strokeStyle = context.colours.role("panel");
      pen.lineWidth = 1.5;
      pen.beginPath();
      pen.arc(x(now.x), y(now.y), 4, 0, 2 * Math.PI);
      pen.fill();
      pen.stroke();
    }
  };

  const values = (at) =>
    plot.lines
      .map(({ line, points: list }) => ({ line, point: spec.across ? nearest(list, at) : newest(list, at) }))
      .filter(({ point }) => point)
      .map(({ line, point }) => ({ label: line.label, x: point.x, text: format(point.y, spec.format) + spread(point) }));

  const spread = ({ ends = [] }) => (ends.length && ends.every(Number.isFinite) ? ` (${ends.map((end) => format(end, spec.format)).join(" to ")})` : "");

  const describe = () => {
    const ends = ({ line, points: list }) => `${line.label}: ${format(list[0].y, spec.format)} to ${format(list[list.length - 1].y, spec.format)}`;
    const now = spec.across ? plot.lines.filter((l) => l.points.length).map(ends) : values(step).map((v) => `${v.label}: ${v.text}`);
    return `${spec.title || spec.y_label}. ${now.join("; ")}`;
  };

  canvas.addEventListener("pointermove", (event) => {
    if (!plot || context.bare) return;
    const at = Math.round(plot.x.invert(within(event, canvas).x));
    const read = values(at);
    if (read.length) context.tip.near(event, [`${spec.x_label || "step"} ${read[0].x}`, ...read.map((v) => `${v.label} ${v.text}`)]);
  });
  canvas.addEventListener("pointerleave", () => context.tip.hide());

  return {
    draw,
    resize() {
      state = "";
      draw(step);
    },
    dispose() {
      wrap.remove();
      key.remove();
    },
    table() {
      if (!plot) return { columns: [], rows: [] };
      const xs = [...new Set(plot.lines.flatMap((l) => l.points.filter((p) => p.at <= step || spec.across).map((p) => p.x)))].sort((a, b) => a - b);
      const rows = xs.slice(-200).map((x) => [x, ...plot.lines.map(({ points: list }) => {
        const point = list.find((p) => p.x === x);
        return point ? format(point.y, spec.format) : "";
      })]);
      return { columns: [spec.x_label || "step", ...spec.lines.map((line) => line.label)], rows };
    },
  };
}

function newest(list, step) {
  let found = null;
  for (const point of list) if (point.at <= step) found = point;
  return found;
}

function nearest(list, x) {
  return list.reduce((best, p) => (best && Math.abs(best.x - x) <= Math.abs(p.x - x) ? best : p), null);
}

function trace(pen, list, x, y, line, colours) {
  shade(pen, list, x, y, colours.role(line.colour));
  pen.strokeStyle = colours.role(line.colour);
  pen.lineWidth = 1.75;
  pen.lineJoin = "round";
  pen.setLineDash(line.dashed ? [5, 4] : []);
  pen.beginPath();
  list.forEach((point, i) => (i ? pen.lineTo(x(point.x), y(point.y)) : pen.moveTo(x(point.x), y(point.y))));
  pen.stroke();
  pen.setLineDash([]);
}

/** The band around a line, from the lowest to the highest of what it is the mean of. */
function shade(pen, list, x, y, colour) {
  const held = list.filter(({ ends }) => ends && ends.length > 1 && ends.every(Number.isFinite));
  if (held.length < 2) return;
  const alpha = pen.globalAlpha;
  pen.globalAlpha = 0.2 * alpha;
  pen.fillStyle = colour;
  pen.beginPath();
  held.forEach((point, i) => (i ? pen.lineTo(x(point.x), y(point.ends[1])) : pen.moveTo(x(point.x), y(point.ends[1]))));
  for (const point of [...held].reverse()) pen.lineTo(x(point.x), y(point.ends[0]));
  pen.fill();
  pen.globalAlpha = alpha;
}
