/**
 * Cache strips, one a strategy, in lockstep: each slot a bar in the colour of what it holds, hatched when it is gone.
 * Where there are more slots than room, bars are split: slots stand one over the other, column after column, so that
 * every slot keeps a place of its own.
 */
import { STATES } from "./colours.js";
import { make, say, sized } from "./dom.js";
import { within } from "./glass.js";
import { format, visible } from "./text.js";

const STRIP_HEIGHT = 26;
const PITCH = 3.6; // the least room a column of slots gets
const LEAD = 5; // a leading slot's room
const LEAD_GAP = 7; // between the leading slots and the rest

export function slots(host, spec, context) {
  const { store } = context;
  const list = make("div", { class: "strips" });
  const legend = make("div", { class: "legend" });
  host.append(list, context.bare ? "" : legend);
  const strips = spec.strips.map((strip) => createStrip(list, strip, spec, context));
  let shown = "";
  let step = 0;

  /** The legend names the states that this run really has. */
  const explain = (seen) => {
    const names = spec.states.filter((name, code) => seen.has(code) && STATES[name]);
    if (names.join() === shown) return;
    shown = names.join();
    legend.replaceChildren(...names.map((name) => make("span", { class: `key state-${name}` }, name)));
  };

  const draw = (now) => {
    step = now;
    const seen = new Set();
    let slotsInAll = 0;
    let lead = 0;
    for (const strip of strips) {
      const known = strip.survey();
      known.codes.forEach((code) => seen.add(code));
      slotsInAll = Math.max(slotsInAll, known.slots);
      lead = Math.max(lead, known.lead);
    }
    explain(seen);
    return strips.map((strip) => strip.draw(step, slotsInAll, lead)).some(Boolean);
  };

  return {
    draw,
    resize() {
      strips.forEach((strip) => strip.forget());
      draw(step);
    },
    dispose() {
      list.remove();
      legend.remove();
    },
    table() {
      const columns = ["strategy", ...spec.states.filter((name) => name !== "empty"), "value"];
      const rows = strips.map((strip) => {
        const count = strip.counts(step);
        return [strip.label, ...columns.slice(1, -1).map((name) => count[spec.states.indexOf(name)] || 0), strip.number(step)];
      });
      return { columns, rows, store };
    },
  };
}

function createStrip(list, strip, spec, context) {
  const { store } = context;
  const canvas = make("canvas", { role: "img", class: "strip-canvas" });
  const detail = make("div", { class: "strip-detail" });
  const number = make("div", { class: `figure ink-${strip.colour}` });
  const row = make(
    "div",
    { class: "strip" },
    make("div", { class: "strip-name" }, make("div", { class: "strip-label" }, strip.label), detail),
    make("div", { class: "strip-slots" }, canvas),
    strip.number ? make("div", { class: "strip-number" }, number, make("div", { class: "small" }, strip.number_label)) : null,
    strip.aside ? make("div", { class: "strip-aside" }, strip.aside) : null,
  );
  list.append(row);
  const sink = spec.states.indexOf("sink");
  const gone = spec.states.indexOf("evicted");
  let known = { version: -1, codes: new Set(), lead: 0, slots: 0, chunks: 0 };
  let plan = null;
  let key = "";

  /** Which codes occur, how many slots there are, and how many leading ones are sinks; read once a chunk. */
  const survey = () => {
    const track = store.of(strip.codes);
    if (!track || track.version === known.version) return known;
    for (const chunk of track.chunks.slice(known.chunks)) for (const code of chunk.data) known.codes.add(code);
    const newest = track.row(track.count - 1);
    let lead = 0;
    while (lead < newest.width && newest.data[newest.offset + lead] === sink) lead += 1;
    const growing = track.chunks[0].widths.length > 0 || track.chunks[0].shape[0] !== newest.width;
    known = {
      version: track.version,
      codes: known.codes,
      chunks: track.chunks.length,
      lead: Math.max(known.lead, lead),
      slots: Math.max(track.extent(track.axes[0]), newest.width) + (growing ? store.ahead : 0),
    };
    return known;
  };

  const codesAt = (step) => store.sent(strip.codes, step);

  const counts = (step) => {
    const found = new Array(spec.states.length).fill(0);
    for (const code of codesAt(step) || []) found[code] += 1;
    return found;
  };

  const describe = (step) => {
    const found = counts(step);
    const evicted = gone < 0 ? 0 : found[gone];
    const kept = found.reduce((sum, n, code) => sum + (code === gone || spec.states[code] === "empty" ? 0 : n), 0);
    const values = { kept, evicted, slots: kept + evicted };
    say(detail, strip.detail.replace(/\{(\w+)\}/g, (all, name) => (name in values ? String(values[name]) : all)));
    canvas.setAttribute("aria-label", `${strip.label}: ${kept} slots held, ${evicted} evicted`);
  };

  const figure = (step) => {
    const track = strip.number ? store.of(strip.number) : null;
    const value = track ? track.scalarAt(step) : null;
    return value === null || Number.isNaN(value) ? "…" : format(value, strip.number_format);
  };

  const draw = (step, slotsInAll, lead) => {
    const codes = codesAt(step);
    say(number, strip.number ? figure(step) : "");
    if (!codes) return false;
    describe(step);
    const width = canvas.parentElement.clientWidth;
    const now = `${width} ${slotsInAll} ${lead} ${context.theme}`;
    if (now !== key) {
      key = now;
      plan = places(width, slotsInAll, lead);
      sized(canvas, width, STRIP_HEIGHT + 6);
    }
    paint(canvas.getContext("2d"), plan, codes, codesAt(step - 1), spec, context);
    return true;
  };

  const lines = (n, codes) => {
    const piece = spec.labels === "tokens" && store.pieces[n] !== undefined ? ` “${visible(store.pieces[n])}”` : "";
    return [`${spec.states[codes[n]]}`, `slot of token ${n}${piece}`];
  };

  canvas.addEventListener("pointermove", (event) => {
    const { x, y } = within(event, canvas);
    const codes = codesAt(context.player.step);
    const n = plan && codes ? plan.find(x, y) : -1;
    if (n >= 0 && n < codes.length && codes[n]) context.tip.near(event, lines(n, codes));
    else context.tip.hide();
  });
  canvas.addEventListener("pointerleave", () => context.tip.hide());

  return { draw, survey, counts, number: figure, label: strip.label, forget: () => (key = "") };
}

/** Where each of `count` slots stands in a strip `width` wide. */
function places(width, count, lead) {
  const rest = Math.max(1, count - lead);
  const pitchOf = (room, n) => Math.min(14, room / n);
  const head = lead ? lead * LEAD + LEAD_GAP : 0;
  const deep = Math.max(1, Math.ceil((rest * PITCH) / Math.max(PITCH, width - head)));
  const columns = Math.ceil(rest / deep);
  const pitch = pitchOf(width - head, columns);
  const gap = Math.min(2, Math.max(0.8, pitch * 0.26));
  const height = STRIP_HEIGHT / deep;
  const box = (n) => {
    if (n < lead) return [n * LEAD, 3, LEAD - 1.2, STRIP_HEIGHT];
    const m = n - lead;
    return [head + Math.floor(m / deep) * pitch, 3 + (m % deep) * height, pitch - gap, height];
  };
  const find = (x, y) => {
    if (x < head) return lead ? Math.min(lead - 1, Math.floor(x / LEAD)) : -1;
    const within = Math.min(deep - 1, Math.max(0, Math.floor((y - 3) / height)));
    return lead + Math.floor((x - head) / pitch) * deep + within;
  };
  const ground = new Path2D(); // room for every slot of the whole run, so that growing is seen
  for (let n = 0; n < count; n += 1) ground.rect(...box(n));
  return { box, find, ground };
}

function paint(pen, plan, codes, before, spec, context) {
  const { colours } = context;
  pen.clearRect(0, 0, pen.canvas.width, pen.canvas.height);
  pen.fillStyle = colours.role("sunk");
  pen.fill(plan.ground);
  const paths = new Map();
  const leaving = [];
  for (let n = 0; n < codes.length; n += 1) {
    const state = spec.states[codes[n]];
    const look = STATES[state];
    if (!look) continue;
    if (!paths.has(look)) paths.set(look, new Path2D());
    paths.get(look).rect(...plan.box(n));
    if (state === "evicted" && before && n < before.length && spec.states[before[n]] !== "evicted") leaving.push(n);
  }
  for (const [look, path] of paths) {
    pen.fillStyle = look === "hatch" ? hatching(pen, colours.role("hatch"), context.theme) : colours.role(look);
    pen.fill(path);
  }
  pen.strokeStyle = colours.role("alarm");
  pen.fillStyle = colours.role("alarm");
  pen.lineWidth = 1.5;
  for (const n of leaving) {
    const [x, y, w, h] = plan.box(n);
    pen.strokeRect(x - 0.25, y, w + 0.5, h);
    pen.fillRect(x - 1, 0, w + 2, 2);
  }
  if (!codes.length) return;
  const [x, , w] = plan.box(codes.length - 1);
  pen.fillStyle = colours.role("ink");
  pen.fillRect(x - 0.5, STRIP_HEIGHT + 4, w + 1, 2);
}

const hatches = new Map();

/** Diagonal lines: gone, in a way that needs no colour to be told. */
function hatching(pen, colour, theme) {
  const key = `${colour} ${theme}`;
  if (!hatches.has(key)) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 5;
    const inner = tile.getContext("2d");
    inner.strokeStyle = colour;
    inner.lineWidth = 1.3;
    inner.beginPath();
    for (const shift of [-5, 0, 5]) {
      inner.moveTo(shift - 1, 6);
      inner.lineTo(shift + 6, -1);
    }
    inner.stroke();
    hatches.set(key, pen.createPattern(tile, "repeat"));
  }
  return hatches.get(key);
}
