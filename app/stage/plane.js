/**
 * Points on two axes: a roofline, a Pareto front. The wheel, two fingers or the + and - keys enlarge, dragging or the
 * arrow keys with Shift move, 0 or a double click shows all again; arrow keys alone go from point to point.
 */
import { axis, scaleOf } from "./axes.js";
import { createCursor } from "./cursor.js";
import { make, sized } from "./dom.js";
import { enlargement, within } from "./glass.js";
import { format } from "./text.js";

const SPACE = { left: 46, right: 14, top: 12, bottom: 30 };
const NEAR = 18; // pixels from a point that still mean it
const GROWTH = 1.25;

export function plane(host, spec, context) {
  const { store } = context;
  const canvas = make("canvas", { tabindex: 0, role: "application", "aria-roledescription": "chart", style: { "touch-action": "pan-y" } });
  const wrap = make("div", { class: "canvas-wrap" }, canvas);
  const all = make("button", { type: "button", class: "plane-all", hidden: true, on: { click: () => reset() } }, "show all");
  const keys = [...spec.lines, ...spec.points].filter((entry) => entry.label);
  const legend = make("div", { class: "legend" }, keys.map((entry) =>
    make("span", { class: `key ${spec.lines.includes(entry) ? `line ${entry.dashed ? "dashed" : ""}` : ""} ink-${entry.colour} fill-${entry.colour}` }, make("span", { class: "key-text" }, entry.label))));
  host.append(wrap, context.bare ? "" : make("div", { class: "plane-foot" }, legend, all));
  let step = 0;
  let zoom = null; // [low, high] of x and y, in the scales' own terms
  let layout = null;

  const rowOf = (tensor, r) => {
    const track = store.of(tensor);
    if (!track) return [];
    const count = track.countAt(step);
    const row = r === undefined ? count - 1 : r;
    if (row < 0 || row >= count) return [];
    return track.numbers(row);
  };

  const usable = ({ x, y }) => Number.isFinite(x) && Number.isFinite(y) && (!spec.log_x || x > 0) && (!spec.log || y > 0);

  /** Every point at the step: {group, x, y, name, index, row, old}. */
  const read = () =>
    spec.points.flatMap((group) => {
      const track = store.of(group.x);
      const count = track ? track.countAt(step) : 0;
      const first = group.trail ? 0 : Math.max(0, count - 1);
      return Array.from({ length: count - first }, (_, i) => first + i).flatMap((r) => {
        const ys = rowOf(group.y, r);
        return rowOf(group.x, r)
          .map((x, index) => ({ group, x, y: ys[index], index, row: r, name: group.names[index] || (group.trail ? `${group.label} ${r + 1}` : group.label), old: group.trail && r < count - 1 }))
          .filter(usable);
      });
    });

  const lines = () =>
    spec.lines.map((line) => {
      const ys = rowOf(line.tensor);
      const xs = line.x ? rowOf(line.x) : ys.map((_, i) => i);
      return { line, list: xs.map((x, i) => ({ x, y: ys[i] })).filter(usable) };
    });

  /** All points of the run so far, whatever the step: axes that jumped with it would hide what moves. */
  const everywhere = () =>
    spec.points.flatMap((group) => {
      const [xs, ys] = [store.of(group.x), store.of(group.y)];
      const rows = xs && ys ? Math.min(xs.count, ys.count) : 0;
      return Array.from({ length: rows }, (_, r) => r).flatMap((r) => {
        const { shape, width } = xs.row(r);
        return Array.from({ length: shape.length ? width : 1 }, (_, i) => ({ x: xs.value(r, i), y: ys.value(r, i) })).filter(usable);
      });
    });

  const spread = (values, log) => {
    const known = values.map((v) => (log ? Math.log(v) : v));
    const low = Math.min(...known);
    const high = Math.max(...known);
    const pad = (high - low) * 0.07 || 0.5;
    return [low - pad, high + pad];
  };

  const lay = () => {
    const points = read();
    const curves = lines();
    const every = [...everywhere(), ...curves.flatMap(({ list }) => list)];
    if (!every.length || !host.clientWidth) return null;
    const width = host.clientWidth;
    const height = context.height || spec.height;
    const margin = context.bare ? { left: 4, right: 4, top: 4, bottom: 4 } : SPACE;
    const bounds = zoom || { x: spread(every.map((p) => p.x), spec.log_x), y: spread(every.map((p) => p.y), spec.log) };
    const ends = ([low, high], log) => (log ? [Math.exp(low), Math.exp(high)] : [low, high]);
    const x = scaleOf(...ends(bounds.x, spec.log_x), margin.left, width - margin.right, spec.log_x);
    const y = scaleOf(...ends(bounds.y, spec.log), height - margin.bottom, margin.top, spec.log);
    return { points, curves, bounds, x, y, width, height, margin };
  };

  const paint = () => {
    const { width, height, margin, x, y, points, curves } = layout;
    const pen = sized(canvas, width, height);
    pen.clearRect(0, 0, width, height);
    if (!context.bare) {
      axis(pen, { x, y, width, height, margin, spec, context });
      pen.font = `11px ${context.fonts.text}`;
      pen.fillStyle = context.colours.role("muted");
      pen.textAlign = "left";
      pen.textBaseline = "top";
      if (spec.y_label) pen.fillText(spec.y_label, margin.left + 4, 0);
    }
    pen.save();
    pen.beginPath();
    pen.rect(margin.left, margin.top - 8, width - margin.left - margin.right + 8, height - margin.top - margin.bottom + 8);
    pen.clip();
    for (const { line, list } of curves) stroke(pen, list, x, y, context.colours.role(line.colour), line.dashed);
    for (const group of spec.points) {
      if (group.joined) stroke(pen, points.filter((p) => p.group === group && !p.old), x, y, context.colours.role(group.colour), false);
    }
    const taken = [];
    const dots = points.filter((p) => !p.old).map((p) => [x(p.x) - 6, y(p.y) - 6, 12]);
    for (const point of points) dot(pen, point, x, y, context);
    if (!context.bare) for (const point of points) if (point.group.names.length && !point.old) label(pen, point, taken, dots, layout, context);
    pen.restore();
  };

  const box = (at) => {
    const point = layout && layout.points[at];
    return point ? { x: layout.x(point.x) - 8, y: layout.y(point.y) - 8, width: 16, height: 16 } : null;
  };

  const cursor = createCursor(wrap, canvas, context.tip, {
    find: (px, py) => {
      if (!layout) return null;
      const far = layout.points.map((p) => Math.hypot(layout.x(p.x) - px, layout.y(p.y) - py));
      const best = far.indexOf(Math.min(...far));
      return best >= 0 && far[best] <= NEAR ? best : null;
    },
    box: (at) => (at === null ? null : box(at)),
    move: (at, rows, columns) => {
      if (!layout || !layout.points.length) return null;
      const order = layout.points.map((_, i) => i).sort((a, b) => layout.points[a].x - layout.points[b].x);
      const place = at === null ? -1 : order.indexOf(at);
      return order[Math.max(0, Math.min(order.length - 1, place + (columns || -rows)))];
    },
    lines: (at) => {
      const { name, x, y } = layout.points[at];
      return [name, `${spec.x_label || "x"} ${format(x, spec.x_format)}`, `${spec.y_label || "y"} ${format(y, spec.format)}`];
    },
    open: (at) => {
      const track = spec.cell && spec.tensor ? store.of(spec.tensor) : null;
      if (!track) return;
      const { group, index, row } = layout.points[at];
      const [inner, outer] = [...track.axes].reverse();
      const place = spec.points.indexOf(group);
      if (outer && place >= track.extent(outer)) return;
      context.open({ [inner]: index, ...(outer && { [outer]: place }), ...(track.about.grows && { [track.about.grows]: row }) });
    },
  }, context.announce);

  const redraw = () => {
    layout = lay();
    if (!layout) return false;
    paint();
    cursor.refresh();
    all.hidden = !zoom;
    canvas.setAttribute("aria-label", `${spec.title}: ${layout.points.length} points. Arrow keys read them, plus and minus enlarge.`);
    return true;
  };

  const enlarge = (factor, px, py) => {
    if (!layout) return;
    const part = (pixel, from, to) => Math.max(0, Math.min(1, (pixel - from) / (to - from)));
    const shrink = ([low, high], share) => {
      const middle = low + (high - low) * share;
      return [middle - (middle - low) / factor, middle + (high - middle) / factor];
    };
    const { margin, width, height, bounds } = layout;
    zoom = {
      x: shrink(bounds.x, part(px, margin.left, width - margin.right)),
      y: shrink(bounds.y, part(py, height - margin.bottom, margin.top)),
    };
    redraw();
  };

  const shift = (dx, dy) => {
    if (!layout) return;
    const { margin, width, height, bounds } = layout;
    const by = ([low, high], share) => [low + (high - low) * share, high + (high - low) * share];
    zoom = { x: by(bounds.x, -dx / (width - margin.left - margin.right)), y: by(bounds.y, dy / (height - margin.top - margin.bottom)) };
    redraw();
  };

  const reset = () => {
    zoom = null;
    redraw();
  };

  let held = null;
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey && !zoom && document.activeElement !== canvas && host.getRootNode().activeElement !== canvas) return; // the page scrolls
    event.preventDefault();
    const { x, y } = within(event, canvas);
    enlarge(event.deltaY < 0 ? GROWTH : 1 / GROWTH, x, y);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    held = event.pointerType === "mouse" ? [event.clientX, event.clientY] : null;
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!held || !(event.buttons & 1)) return;
    shift((event.clientX - held[0]) / enlargement(), (event.clientY - held[1]) / enlargement());
    held = [event.clientX, event.clientY];
  });
  canvas.addEventListener("pointerup", () => (held = null));
  canvas.addEventListener("dblclick", reset);
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
    const middle = layout ? [layout.width / 2, layout.height / 2] : [0, 0];
    if (event.key === "+" || event.key === "=") enlarge(GROWTH, ...middle);
    else if (event.key === "-") enlarge(1 / GROWTH, ...middle);
    else if (event.key === "0") reset();
    else if (event.shiftKey && event.key in moves) shift(...moves[event.key]);
    else return;
    event.preventDefault();
    event.stopImmediatePropagation();
  }, true);

  return {
    draw(now) {
      step = now;
      return redraw();
    },
    resize: () => redraw(),
    dispose() {
      wrap.remove();
    },
    table: () => ({
      columns: ["point", spec.x_label || "x", spec.y_label || "y"],
      rows: (layout ? layout.points : []).map(({ name, x, y }) => [name, format(x, spec.x_format), format(y, spec.format)]),
    }),
  };
}

function stroke(pen, list, x, y, colour, dashed) {
  pen.strokeStyle = colour;
  pen.lineWidth = 1.75;
  pen.setLineDash(dashed ? [5, 4] : []);
  pen.beginPath();
  list.forEach((p, i) => (i ? pen.lineTo(x(p.x), y(p.y)) : pen.moveTo(x(p.x), y(p.y))));
  pen.stroke();
  pen.setLineDash([]);
}

function dot(pen, point, x, y, { colours }) {
  pen.globalAlpha = point.old ? 0.28 : 1;
  pen.fillStyle = colours.role(point.group.colour);
  pen.strokeStyle = colours.role("panel");
  pen.lineWidth = 1.5;
  pen.beginPath();
  pen.arc(x(point.x), y(point.y), point.old ? 3.5 : 5.5, 0, 2 * Math.PI);
  pen.fill();
  pen.stroke();
  pen.globalAlpha = 1;
}

/** A point's name where there is room for it: right, left, above or below, if it can be on no other point; else it is
 * read by pointing. */
function label(pen, point, taken, dots, { x, y, width, margin }, { colours, fonts }) {
  pen.font = `11px ${fonts.text}`;
  const wide = pen.measureText(point.name).width;
  const [px, py] = [x(point.x), y(point.y)];
  const places = [[px + 9, py - 6], [px - 9 - wide, py - 6], [px - wide / 2, py - 22], [px - wide / 2, py + 9]];
  const free = (things) => ([left, top]) =>
    left > margin.left && left + wide < width - Math.max(2, margin.right || 0) && things.every((t) => left > t[0] + t[2] || left + wide < t[0] || top > t[1] + 12 || top + 12 < t[1]);
  const place = places.find(free([...taken, ...dots])) || places.find(free(taken));
  if (!place) return;
  taken.push([...place, wide]);
  pen.fillStyle = colours.role("ink");
  pen.textAlign = "left";
  pen.textBaseline = "top";
  pen.fillText(point.name, place[0], place[1]);
}
