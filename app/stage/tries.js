/**
 * All tries of this browser on two axes, lower left is better: the front of those that none beats in both, the way that
 * the run on the page came, and a list of them to open again, to hand on as links, and to drop.
 */
import { addTry, forgotten, frontOf, keepTries, triesOf } from "./attempts.js";
import { axis, scaleOf } from "./axes.js";
import { createCursor } from "./cursor.js";
import { fill, make, say, sized } from "./dom.js";
import { format } from "./text.js";
import { placeOf, tokenOf } from "./token.js";

const FIELD = { left: 46, right: 18, top: 14, bottom: 30 };
const CLOSE = 18; // pixels from a try that still mean it

export function tries(host, spec, context) {
  const { store } = context;
  const { slug, defaults, href } = context.lesson || { slug: "demo", defaults: {}, href: null };
  const canvas = make("canvas", { tabindex: 0, role: "application", "aria-roledescription": "chart", style: { "touch-action": "pan-y" } });
  const wrap = make("div", { class: "canvas-wrap" }, canvas);
  const legend = make("div", { class: "legend tries-legend" }, ...["front", "try", "here", "first"].map((kind) =>
    make("span", { class: `key tries-key tries-${kind}` }, make("span", { class: "key-text" }, { front: "on the front", try: "a try", here: "this run", first: "the original" }[kind]))));
  const list = make("ul", { class: "tries-list" });
  const about = make("p", { class: "small tries-about", role: "status" });
  const clear = make("button", { type: "button", class: "plain-button", on: { click: () => drop(() => false, "All tries of this kind are gone.") } }, "Clear all");
  host.append(wrap, ...(context.bare ? [] : [legend, list, make("div", { class: "tries-foot" }, about, clear)]));
  let step = 0;
  let layout = null;
  let shown = "";

  const allowed = () => (spec.allowed === null || spec.allowed === undefined ? null : Number(spec.allowed.knob ? context.knobs[spec.allowed.knob] : spec.allowed) / 100);
  const valueOf = (name) => (store.values || context.knobs)[name];
  /** What tries must share to be compared: the model and machine that ran, and the knobs `apart`. */
  const group = () => [store.model.name, store.model.device, store.model.dtype, ...spec.apart.map(valueOf)].map((value) => String(value ?? "")).join(" · ");
  const words = () => spec.words.replace(/\{(\w+)\}/g, (_, name) => String(valueOf(name) ?? ""));
  const tokenHere = () => tokenOf({ knobs: store.values || context.knobs, beat: 0, step: 0 }, defaults);

  /** The way of this run at a step: {x, y} of each row that has both. */
  const way = (now) => {
    const [xs, ys] = [store.newest(spec.x, now) || [], store.newest(spec.y, now) || []];
    return xs.map((x, i) => ({ x, y: ys[i] })).filter(({ x, y }) => Number.isFinite(x) && Number.isFinite(y) && x > 0 && y > 0);
  };
  const finish = () => (store.of(spec.done) ? Infinity : step);

  /** Keep the run's try once it is whole, whatever step is looked at. */
  const note = () => {
    if (!store.of(spec.done) || !store.values || context.bare) return;
    const path = way(Infinity);
    const end = path[path.length - 1];
    if (!end) return;
    const figures = spec.figures.map(({ tensor }) => {
      const track = store.of(tensor);
      return track ? track.scalarAt(Infinity) : null;
    });
    addTry(slug, { token: tokenHere(), group: group(), words: words(), x: end.x, y: end.y, figures });
  };

  const drop = (stays, said) => {
    const mine = group();
    keepTries(slug, triesOf(slug).list.filter((one) => one.group !== mine || stays(one)));
    forgotten.add(store.run);
    shown = "";
    refresh();
    context.announce(said);
  };

  const open = (one) => {
    const place = one.token ? placeOf(one.token) : { knobs: {} };
    if (place) context.turnTo?.({ ...defaults, ...place.knobs });
  };

  const copyLink = async (one) => {
    const link = href(one.token);
    try {
      await navigator.clipboard.writeText(link);
      say(about, "Link copied.");
    } catch {
      say(about, link);
    }
  };

  const read = () => {
    const mine = group();
    const all = context.bare ? { list: [], kept: true } : triesOf(slug);
    const points = all.list.filter((one) => one.group === mine);
    const token = tokenHere();
    const path = way(step);
    const front = new Set(frontOf(points));
    return { points: points.map((one) => ({ one, x: one.x, y: one.y, front: front.has(one), here: one.token === token })), path, others: all.list.length - points.length, kept: all.kept, front: frontOf(points) };
  };

  const spread = (values) => {
    const [low, high] = [Math.min(...values), Math.max(...values)].map(Math.log);
    const pad = (high - low) * 0.08 || 0.2;
    return [Math.exp(low - pad), Math.exp(high + pad)];
  };

  const lay = () => {
    const found = read();
    const whole = way(finish());
    const every = [...found.points, ...whole];
    if (!every.length || !host.clientWidth) return null;
    const width = host.clientWidth;
    const height = context.height || spec.height;
    const margin = context.bare ? { left: 4, right: 4, top: 4, bottom: 4 } : FIELD;
    const first = whole[0];
    const line = first && allowed() !== null ? first.y * (1 + allowed()) : null;
    const x = scaleOf(...spread(every.map((p) => p.x)), margin.left, width - margin.right, true);
    const y = scaleOf(...spread([...every.map((p) => p.y), ...(line ? [line] : [])]), height - margin.bottom, margin.top, true);
    return { ...found, first, line, x, y, width, height, margin };
  };

  const paint = () => {
    const { x, y, width, height, margin, points, path, front, first, line } = layout;
    const { role } = context.colours;
    const pen = sized(canvas, width, height);
    pen.clearRect(0, 0, width, height);
    if (!context.bare) {
      if (line) {
        pen.fillStyle = role("alarm");
        pen.globalAlpha = 0.07;
        pen.fillRect(margin.left, margin.top, width - margin.left - margin.right, Math.max(0, y(line) - margin.top));
        pen.globalAlpha = 1;
      }
      axis(pen, { x, y, width, height, margin, spec, context });
      pen.font = `11px ${context.fonts.text}`;
      pen.textBaseline = "top";
      pen.textAlign = "left";
      pen.fillStyle = role("muted");
      pen.fillText(spec.y_label, margin.left + 4, 0);
      if (line) {
        stroked(pen, [[margin.left, y(line)], [width - margin.right, y(line)]], role("alarm"), [5, 4], 1.25);
        pen.fillStyle = context.colours.ink("alarm");
        pen.textAlign = "right";
        pen.textBaseline = "bottom";
        pen.fillText(`${format(allowed(), "+.0%")} allowed`, width - margin.right - 4, y(line) - 3);
      }
    }
    const steps = front.flatMap((one, i) => [...(i ? [[x(one.x), y(front[i - 1].y)]] : []), [x(one.x), y(one.y)]]);
    stroked(pen, steps, role("value"), [], 2.25);
    stroked(pen, path.map((p) => [x(p.x), y(p.y)]), role("kept"), [2, 3], 1.25);
    for (const p of path.slice(1)) dotted(pen, x(p.x), y(p.y), 2.5, role("kept"), role("panel"));
    for (const p of points) {
      if (p.here) dotted(pen, x(p.x), y(p.y), 9, role("panel"), role("ink"), 2);
      dotted(pen, x(p.x), y(p.y), 5.5, p.front ? role("value") : role("panel"), p.front ? role("panel") : role("kept"), p.front ? 1.5 : 2);
    }
    if (first) diamond(pen, x(first.x), y(first.y), role("ink"), role("panel"));
  };

  const linesOf = (at) => {
    const { one, front, here } = layout.points[at];
    const more = spec.figures.flatMap(({ label, format: how, unit }, i) => (one.figures[i] === null || one.figures[i] === undefined ? [] : [`${label} ${format(one.figures[i], how)}${unit}`]));
    return [one.words || "at the defaults", `${spec.x_label} ${format(one.x, spec.x_format)}, ${spec.y_label} ${format(one.y, spec.format)}`, ...more, here ? "this run" : front ? "on the front; click to open it" : "beaten by another; click to open it"];
  };

  const cursor = createCursor(wrap, canvas, context.tip, {
    find: (px, py) => {
      if (!layout || !layout.points.length) return null;
      const far = layout.points.map((p) => Math.hypot(layout.x(p.x) - px, layout.y(p.y) - py));
      const best = far.indexOf(Math.min(...far));
      return far[best] <= CLOSE ? best : null;
    },
    box: (at) => {
      const p = layout && layout.points[at];
      return p ? { x: layout.x(p.x) - 11, y: layout.y(p.y) - 11, width: 22, height: 22 } : null;
    },
    move: (at, rowsBy, columnsBy) => {
      if (!layout || !layout.points.length) return null;
      const order = layout.points.map((_, i) => i).sort((a, b) => layout.points[a].x - layout.points[b].x);
      const place = at === null ? -1 : order.indexOf(at);
      return order[Math.max(0, Math.min(order.length - 1, place + (columnsBy || -rowsBy)))];
    },
    lines: linesOf,
    open: (at) => open(layout.points[at].one),
  }, context.announce);

  const listed = () => {
    const now = JSON.stringify([layout?.points.map(({ one, front, here }) => [one, front, here]), layout?.others, layout?.kept]);
    if (now === shown) return;
    shown = now;
    const points = layout ? [...layout.points].reverse() : [];
    fill(list, points.map(({ one, front, here }) =>
      make("li", { class: `tries-item ${front ? "front" : ""} ${here ? "here" : ""}` },
        make("span", { class: "tries-mark", "aria-hidden": "true" }),
        make("span", { class: "tries-words" }, one.words || "at the defaults", make("span", { class: "visually-hidden" }, front ? ", on the front" : "")),
        make("span", { class: "tries-figures" }, `${format(one.x, spec.x_format)} · ${format(one.y, spec.format)}`),
        make("span", { class: "tries-acts" },
          here ? make("span", { class: "small" }, "this run") : make("button", { type: "button", class: "plain-button", "aria-label": `Open the try ${one.words}`, on: { click: () => open(one) } }, "Open"),
          href ? make("button", { type: "button", class: "plain-button", "aria-label": `Copy a link to the try ${one.words}`, on: { click: () => copyLink(one) } }, "Copy link") : null,
          make("button", { type: "button", class: "icon-button", "aria-label": `Remove the try ${one.words}`, title: "Remove", on: { click: () => drop((other) => other !== one && JSON.stringify(other) !== JSON.stringify(one), "The try is gone.") } }, "✕")))));
    clear.hidden = !points.length;
    const count = points.length === 1 ? "One try" : `${points.length} tries`;
    const elsewhere = layout?.others ? ` ${layout.others} more, of other models, texts or machines, ${layout.others === 1 ? "is" : "are"} kept apart.` : "";
    const where = layout && !layout.kept ? " This browser keeps nothing: they last until you leave." : " Kept in this browser alone.";
    say(about, points.length ? `${count}.${where}${elsewhere}` : `Your tries will stand here.${elsewhere}`);
  };

  const refresh = () => {
    layout = lay();
    if (layout) {
      paint();
      cursor.refresh();
    }
    listed();
    const many = layout ? layout.points.length : 0;
    canvas.setAttribute("aria-label", `${spec.title}: ${many} tries of this browser, ${layout ? layout.front.length : 0} on the front. Arrow keys read them, Enter opens one.`);
    return Boolean(layout);
  };

  return {
    draw(now) {
      step = now;
      if (!forgotten.has(store.run)) note();
      return refresh();
    },
    resize: () => refresh(),
    dispose() {
      wrap.remove();
    },
    table: () => ({
      columns: ["try", spec.x_label, spec.y_label, ...spec.figures.map(({ label }) => label), "front"],
      rows: (layout ? layout.points : []).map(({ one, front }) => [one.words || "at the defaults", format(one.x, spec.x_format), format(one.y, spec.format), ...spec.figures.map(({ format: how }, i) => format(one.figures[i] ?? "–", how)), front ? "yes" : ""]),
    }),
  };
}

function stroked(pen, points, colour, dash, width) {
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.setLineDash(dash);
  pen.beginPath();
  points.forEach(([px, py], i) => (i ? pen.lineTo(px, py) : pen.moveTo(px, py)));
  pen.stroke();
  pen.setLineDash([]);
}

function dotted(pen, px, py, radius, inside, edge, width = 1.5) {
  pen.fillStyle = inside;
  pen.strokeStyle = edge;
  pen.lineWidth = width;
  pen.beginPath();
  pen.arc(px, py, radius, 0, 2 * Math.PI);
  pen.fill();
  pen.stroke();
}

function diamond(pen, px, py, inside, edge) {
  pen.fillStyle = inside;
  pen.strokeStyle = edge;
  pen.lineWidth = 1.5;
  pen.beginPath();
  pen.moveTo(px, py - 7);
  pen.lineTo(px + 7, py);
  pen.lineTo(px, py + 7);
  pen.lineTo(px - 7, py);
  pen.closePath();
  pen.fill();
  pen.stroke();
}
