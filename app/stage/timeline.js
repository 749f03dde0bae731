/**
 * Lanes with intervals of time. What works stands above, what is on its way below it: grey where work hides it, red where
 * somebody waits for it. What is past is firm, what is to come faint.
 */
import { draw, make, say } from "./dom.js";
import { hueOf } from "./owners.js";
import { short } from "./text.js";

const WORK_TALL = 17;
const WAY_TALL = 6;
const LANE_GAP = 11;
const AXIS_TALL = 24;
const LANES_LEFT = 68; // room for a lane's name
const TICKS = [1, 2, 5];

let timelineCount = 0; // clip paths need names of their own

/** What of a picture was played through rather than timed. */
export function tagSimulated(tag, spec, store, step) {
  const how = (spec.simulated && store.of(spec.simulated)?.scalarAt(step)) || 0;
  tag.hidden = !how;
  say(tag, how > 1 ? "simulated: clock and link" : "simulated: link");
}

export function timeline(host, spec, context) {
  const { store } = context;
  const name = `timeline-${(timelineCount += 1)}`;
  const picture = draw("svg", { role: "img", class: "timeline", "aria-label": `${spec.title}: nothing has run yet` });
  const list = make("div", { class: "timeline-focus", role: "application", tabindex: context.bare ? null : 0, "aria-label": `${spec.title}: intervals. Arrow keys read them` }, picture);
  const tag = make("span", { class: "origin origin-simulated ring-tag", hidden: true });
  const legend = make(
    "div",
    { class: "legend" },
    make("span", { class: "key fill-recent" }, spec.kinds[0]),
    spec.kinds.length > 1 ? make("span", { class: "key fill-kept" }, `${spec.kinds.slice(1).join(", ")}: hidden behind it`) : null,
    spec.kinds.length > 1 ? make("span", { class: "key fill-alarm" }, "not hidden") : null,
    make("span", { class: "key timeline-idle" }, "idle"),
    tag,
  );
  host.append(list, context.bare ? "" : legend);
  let step = 0;
  let key = "";
  let spans = [];
  let moving = null; // what follows the player
  let chosen = -1;

  const read = () => {
    const rows = store.frame(spec.tensor, step);
    return rows ? rows.map(([lane, kind, item, begin, end], n) => ({ n, lane, kind, item, begin, end })) : [];
  };

  const nowAt = () => store.of(spec.now)?.scalarAt(step) ?? 0;
  const laneName = (lane) => spec.names[lane] || `${spec.lanes} ${lane}`;
  const says = ({ lane, kind, item, begin, end }) => `${laneName(lane)} ${spec.kinds[kind]} ${spec.items} ${item}`.concat(`, ${ms(begin)} to ${ms(end)} ms`);

  /** The parts of a transfer in which its lane does no work. */
  const bareParts = ({ lane, begin, end }) => {
    let parts = [[begin, end]];
    for (const work of spans.filter((s) => s.lane === lane && s.kind === 0)) {
      parts = parts.flatMap(([a, b]) => [[a, Math.min(b, work.begin)], [Math.max(a, work.end), b]].filter(([p, q]) => q > p));
    }
    return parts;
  };

  const paint = () => {
    const width = host.clientWidth;
    const lanes = Math.max(...spans.map((s) => s.lane)) + 1;
    const ways = spec.kinds.length - 1;
    const pitch = context.bare ? Math.min(26, ((context.height || 170) - 4) / lanes) : WORK_TALL + ways * (WAY_TALL + 1) + LANE_GAP;
    const scaleDown = context.bare ? pitch / (WORK_TALL + ways * (WAY_TALL + 1) + LANE_GAP) : 1;
    const left = context.bare ? 2 : LANES_LEFT;
    const end = Math.max(1, store.of(spec.end)?.scalarAt(step) ?? 0, ...spans.map((s) => s.end));
    const x = (t) => left + (t / end) * (width - left - 8);
    const y = (lane) => 2 + lane * pitch;
    const tall = lanes * pitch;
    const height = tall + (context.bare ? 2 : AXIS_TALL);
    const back = [];
    for (let lane = 0; lane < lanes; lane += 1) {
      back.push(draw("rect", { x: left, y: y(lane), width: width - left - 8, height: WORK_TALL * scaleDown, rx: 3, class: "timeline-ground" }));
      if (!context.bare) back.push(draw("text", { x: left - 8, y: y(lane) + WORK_TALL / 2, class: "routes-label", "text-anchor": "end", "dominant-baseline": "central" }, laneName(lane)));
    }
    if (!context.bare) back.push(...axisOf(end, x, tall, width));
    const bars = () => spans.flatMap((span) => barsOf(span, x, y, scaleDown));
    const clip = draw("rect", { x: 0, y: 0, width: 0, height });
    const cursor = draw("line", { y1: 0, y2: tall, class: "timeline-now" });
    moving = { clip, cursor, x };
    const defs = draw("defs", {}, draw("clipPath", { id: name }, clip));
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.style.height = `${height}px`;
    picture.replaceChildren(defs, ...back, draw("g", { class: "timeline-coming" }, bars()), draw("g", { "clip-path": `url(#${name})` }, bars()), cursor);
  };

  const barsOf = (span, x, y, scaleDown) => {
    const width = Math.max(0.75, x(span.end) - x(span.begin));
    const pick = chosen === span.n ? " chosen" : "";
    if (span.kind === 0) {
      const at = { x: x(span.begin), y: y(span.lane), width, height: WORK_TALL * scaleDown, rx: 3 };
      const label = width > 18 && !context.bare ? draw("text", { x: at.x + width / 2, y: at.y + WORK_TALL / 2, class: "ring-letter", "text-anchor": "middle", "dominant-baseline": "central" }, String(span.item)) : null;
      return [draw("rect", { ...at, class: `timeline-work${pick}`, style: { fill: context.colours.role(hueOf(span.item)) }, "data-span": span.n }), label].filter(Boolean);
    }
    const top = y(span.lane) + (WORK_TALL + 2 + (span.kind - 1) * (WAY_TALL + 1)) * scaleDown;
    const bar = (from, to, loud) => draw("rect", { x: x(from), y: top, width: Math.max(0.75, x(to) - x(from)), height: WAY_TALL * scaleDown, rx: 2, class: `timeline-way${loud ? " loud" : ""}${pick}`, "data-span": span.n });
    return [bar(span.begin, span.end, false), ...bareParts(span).map(([a, b]) => bar(a, b, true))];
  };

  const axisOf = (end, x, tall, width) => {
    const most = Math.max(3, width / 110);
    const pace = [-1, 0, 1, 2, 3, 4, 5, 6, 7].flatMap((p) => TICKS.map((t) => t * 10 ** p)).find((t) => end / t <= most);
    const nodes = [];
    for (let t = 0; t <= end; t += pace) {
      nodes.push(draw("line", { x1: x(t), x2: x(t), y1: 0, y2: tall, class: "timeline-tick" }));
      nodes.push(draw("text", { x: x(t), y: tall + 14, class: "routes-label", "text-anchor": "middle" }, `${short(t / 1000)}${t ? "" : " ms"}`));
    }
    return nodes;
  };

  const redraw = () => {
    const wanted = `${store.of(spec.tensor)?.id} ${store.of(spec.tensor)?.version} ${store.run} ${host.clientWidth} ${context.theme} ${chosen}`;
    if (wanted !== key) {
      spans = read();
      if (!spans.length || !host.clientWidth) return false;
      key = wanted;
      paint();
    }
    if (!moving) return false;
    const now = nowAt();
    moving.clip.setAttribute("width", moving.x(now));
    for (const end of ["x1", "x2"]) moving.cursor.setAttribute(end, moving.x(now));
    tagSimulated(tag, spec, store, step);
    const at = spans.filter((s) => s.begin <= now && now < s.end && s.kind === 0).map((s) => `${laneName(s.lane)} ${spec.kinds[0]} ${spec.items} ${s.item}`);
    picture.setAttribute("aria-label", `${spec.title}, at ${ms(now)} of ${ms(Math.max(...spans.map((s) => s.end)))} ms: ${at.join("; ") || "nobody works"}`);
    return true;
  };

  list.addEventListener("pointermove", (event) => {
    const bar = event.target.closest?.("[data-span]");
    if (bar) context.tip.near(event, says(spans[Number(bar.dataset.span)]).split(", "));
    else context.tip.hide();
  });
  list.addEventListener("pointerleave", () => context.tip.hide());
  list.addEventListener("blur", () => {
    chosen = -1;
    redraw();
  });
  list.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (!(event.key in moves) || !spans.length) return;
    chosen = Math.max(0, Math.min(spans.length - 1, chosen + moves[event.key]));
    redraw();
    context.announce(says(spans[chosen]));
    event.preventDefault();
    event.stopPropagation();
  });

  return {
    draw(at) {
      step = at;
      return redraw();
    },
    resize() {
      key = "";
      redraw();
    },
    dispose: () => host.replaceChildren(),
    table: () => ({
      columns: [spec.lanes, "does", spec.items, "from, ms", "to, ms"],
      rows: spans.map(({ lane, kind, item, begin, end }) => [laneName(lane), spec.kinds[kind], item, ms(begin), ms(end)]),
    }),
  };
}

function ms(micro) {
  return short(micro / 1000);
}
