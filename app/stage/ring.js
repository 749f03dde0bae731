/**
 * Devices in a circle: what each does, whose block it holds, what travels on the arcs between them. Beside it the matrix,
 * piece by piece in the colour of the device that finished it.
 */
import { draw, make, say } from "./dom.js";
import { hueOf } from "./owners.js";
import { tagSimulated } from "./timeline.js";

const DEVICE_WIDE = 104;
const DEVICE_TALL = 46;
const RING_MOST = 380; // pixels across
const AT_WORK = 100;
const STATE_SAYS = ["starts", "waits", "computes", "done"];

export function ringOfDevices(host, spec, context) {
  const { store } = context;
  const said = make("div", { class: "ring-said" });
  const tag = make("span", { class: "origin origin-simulated ring-tag", hidden: true });
  const picture = draw("svg", { role: "img", class: "ring", "aria-label": spec.title });
  const focus = make("div", { class: "ring-focus", role: "application", tabindex: context.bare ? null : 0 }, picture);
  host.append(...(context.bare ? [focus] : [make("div", { class: "ring-head" }, said, tag), focus]));
  let step = 0;
  let key = "";
  let now = null;
  let cell = null;

  const row = (tensor) => store.frame(tensor, step)?.[0] ?? null;

  const read = () => {
    const states = row(spec.state);
    const chunks = store.frame(spec.chunks, step);
    if (!states || !chunks) return null;
    const [blocks, coming, shares] = [spec.block, spec.coming, spec.share].map(row);
    const matrix = blocks ? store.frame(spec.tensor, step) : null;
    const devices = states.map((state, i) => ({
      i,
      state: blocks ? state : 0,
      up: Boolean(blocks || state),
      block: blocks ? blocks[i] : i,
      coming: coming ? coming[i] : -1,
      share: shares ? shares[i] : 0,
    }));
    return { devices, chunks: chunks.map(([from, to, owner]) => ({ from, to, owner })), matrix };
  };

  const sentence = () => {
    const { devices, matrix } = now;
    if (!matrix) {
      const up = devices.filter((d) => d.up).length;
      return up < devices.length ? `Starting ${devices.length} processes: ${up} ${up === 1 ? "is" : "are"} up.` : `${devices.length} processes are up. The ring begins.`;
    }
    const busy = devices.filter((d) => d.state === 2).map((d) => d.i);
    const left = devices.filter((d) => d.state === 1).map((d) => d.i);
    const count = matrix.flat().filter((v) => v >= 0 && v < AT_WORK).length;
    const all = matrix.flat().filter((v) => v !== -2).length;
    const who = (list, one, many) => (list.length ? `${list.length === 1 ? "Device" : "Devices"} ${list.join(", ")} ${list.length === 1 ? one : many}. ` : "");
    return `${who(busy, "computes", "compute")}${who(left, "waits", "wait")}${count} of ${all} pieces of the matrix are finished.`;
  };

  const redraw = () => {
    const wanted = `${step} ${host.clientWidth} ${context.theme} ${JSON.stringify(context.knobs)} ${store.of(spec.state)?.version} ${store.of(spec.tensor)?.version} ${cell}`;
    if (wanted === key && now) return true;
    now = read();
    if (!now || !host.clientWidth) return false;
    key = wanted;
    say(said, sentence());
    tagSimulated(tag, spec, store, step);
    paint();
    picture.setAttribute("aria-label", `${spec.title}. ${sentence()} ${now.devices.map(deviceSays).join("; ")}`);
    focus.setAttribute("aria-label", `${spec.title}. ${sentence()} Arrow keys walk through the matrix, Enter opens a piece.`);
    return true;
  };

  const deviceSays = ({ i, state, block, coming, share }) =>
    `device ${i} ${STATE_SAYS[state]}${now.matrix ? ` with the block of ${block}` : ""}${coming >= 0 ? `, that of ${coming} is ${share < 1 ? `${Math.round(share * 100)}% on its way` : "here"}` : ""}`;

  const paint = () => {
    const width = host.clientWidth;
    const beside = width > 620 && !context.bare;
    const tall = context.bare ? context.height || 170 : 0;
    const across = context.bare ? Math.min(width * 0.48, tall) : Math.min(RING_MOST, beside ? width * 0.5 : width);
    const high = context.bare ? tall : Math.min(across, 330);
    const side = context.bare ? Math.min(width * 0.45, tall - 8) : Math.min(beside ? width - across - 110 : width - 88, 320);
    const nodes = circle({ cx: across / 2, cy: high / 2, rx: across / 2, ry: high / 2 });
    const origin = context.bare ? [width - side - 4, 4] : beside ? [across + 84, Math.max(26, (high - side) / 2 + 8)] : [66, high + 34];
    nodes.push(...grid(origin, side));
    const height = Math.max(high, origin[1] + side + 8);
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.style.height = `${height}px`;
    picture.replaceChildren(...nodes);
  };

  const circle = ({ cx, cy, rx, ry }) => {
    const n = now.devices.length;
    const small = context.bare || n > 6 || rx < 150;
    const [wide, high] = context.bare ? [26, 18] : small ? [64, 40] : [DEVICE_WIDE, DEVICE_TALL];
    const at = (turn) => {
      const angle = (turn / n) * 2 * Math.PI - Math.PI / 2;
      return [cx + (rx - wide / 2 - 3) * Math.cos(angle), cy + (ry - high / 2 - 3) * Math.sin(angle)];
    };
    const nodes = [];
    if (n > 1) {
      const turns = Array.from({ length: 90 }, (_, i) => at((i * n) / 90).join(" "));
      nodes.push(draw("path", { d: `M${turns.join("L")}Z`, class: "ring-track" }));
      for (let i = 0; i < n; i += 1) {
        const [[x1, y1], [x2, y2]] = [at(i + 0.49), at(i + 0.53)];
        const heading = (Math.atan2(y2 - y1, x2 - x1) * 180) / Math.PI;
        nodes.push(draw("path", { d: "M-5 -5L5 0L-5 5", class: "ring-arrow", transform: `translate(${x2} ${y2}) rotate(${heading})` }));
      }
    }
    nodes.push(...now.devices.map((device) => deviceAt(device, at(device.i), wide, high, small)));
    for (const { i, coming, share } of now.devices) {
      if (coming < 0 || n < 2) continue;
      // It travels from edge to edge of the two boxes: the middle of the arc is half the way.
      const [x, y] = at(i - 1 + 0.26 + 0.48 * share);
      nodes.push(chip(x, y, coming, context.bare ? 5 : 11));
    }
    return nodes;
  };

  const chip = (x, y, owner, size) =>
    draw(
      "g",
      { class: "ring-chip" },
      draw("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size, rx: size / 3, style: { fill: context.colours.role(hueOf(owner)) } }),
      context.bare ? null : draw("text", { x, y: y + 0.5, class: "ring-letter", "text-anchor": "middle", "dominant-baseline": "central" }, String(owner)),
    );

  const deviceAt = ({ i, state, block, up }, [x, y], wide, high, small) => {
    const working = state === 2;
    const hue = context.colours.role(hueOf(block));
    const own = context.colours.role(hueOf(i));
    const [left, top] = [x - wide / 2, y - high / 2];
    const nodes = [
      draw("rect", { x: left, y: top, width: wide, height: high, rx: 9, class: `ring-device${up ? "" : " down"}${working ? " busy" : ""}`, style: { stroke: working ? hue : null } }),
      draw("rect", { x: left, y: top + 8, width: 4, height: high - 16, rx: 2, style: { fill: own, opacity: up ? 1 : 0.3 } }),
    ];
    if (context.bare) return draw("g", {}, nodes, chip(x, y, block, 5));
    const size = small ? 8 : 11;
    nodes.push(draw("text", { x: left + 11, y: top + high * 0.34, class: "ring-name", "dominant-baseline": "central" }, small ? `dev ${i}` : `device ${i}`));
    nodes.push(draw("text", { x: left + 11, y: top + high * 0.7, class: `ring-state${state === 1 && now.matrix ? " loud" : ""}`, "dominant-baseline": "central" }, now.matrix ? STATE_SAYS[state] : up ? "is up" : "starts"));
    if (up) nodes.push(chip(left + wide - size - 5, small ? top + size + 4 : y, block, size));
    return draw("g", { "data-device": i, class: "ring-node" }, nodes);
  };

  /** The matrix in chunks; a mark before each row and column says who keeps it. */
  const grid = ([x0, y0], side) => {
    const { chunks, matrix } = now;
    const size = side / chunks.length;
    const nodes = [];
    const mark = (x, y, w, h, owner) => draw("rect", { x, y, width: w, height: h, rx: 2, style: { fill: context.colours.role(hueOf(owner)) } });
    chunks.forEach(({ from, to, owner }, i) => {
      if (context.bare) return;
      nodes.push(mark(x0 - 10, y0 + i * size + 1, 6, size - 2, owner), mark(x0 + i * size + 1, y0 - 10, size - 2, 6, owner));
      if (size >= 13) nodes.push(draw("text", { x: x0 - 14, y: y0 + (i + 0.5) * size, class: "ring-range", "text-anchor": "end", "dominant-baseline": "central" }, to - from > 1 ? `${from}–${to - 1}` : String(from)));
    });
    if (!context.bare) nodes.push(draw("text", { x: x0, y: y0 - 16, class: "routes-head" }, "keys →"));
    chunks.forEach((_, i) =>
      chunks.forEach((__, j) => {
        const value = matrix ? matrix[i][j] : -1;
        const who = value >= AT_WORK ? value - AT_WORK : value;
        const kind = value === -2 ? "masked" : value === -1 ? "coming" : value >= AT_WORK ? "working" : "finished";
        const hue = who >= 0 ? context.colours.role(hueOf(who)) : null;
        const chosen = cell && cell[0] === i && cell[1] === j ? " chosen" : "";
        nodes.push(draw("rect", { x: x0 + j * size + 0.75, y: y0 + i * size + 0.75, width: size - 1.5, height: size - 1.5, rx: Math.min(4, size / 5), class: `ring-cell ${kind}${chosen}`, style: { fill: kind === "finished" || kind === "working" ? hue : null, stroke: kind === "working" ? hue : null }, "data-cell": `${i} ${j}` }));
      }),
    );
    return nodes;
  };

  const cellSays = (i, j) => {
    const [q, k] = [now.chunks[i], now.chunks[j]];
    const value = now.matrix ? now.matrix[i][j] : -1;
    const state = value === -2 ? "masked: nobody computes it" : value === -1 ? `to be computed by device ${q.owner}` : value >= AT_WORK ? `device ${q.owner} is at it` : `finished by device ${q.owner}`;
    return [state, `queries ${q.from} to ${q.to - 1}, of device ${q.owner}`, `keys ${k.from} to ${k.to - 1}, of device ${k.owner}`];
  };

  focus.addEventListener("pointermove", (event) => {
    if (!now) return;
    const at = event.target.closest?.("[data-cell]");
    const device = event.target.closest?.("[data-device]");
    if (at) context.tip.near(event, cellSays(...at.dataset.cell.split(" ").map(Number)));
    else if (device) context.tip.near(event, deviceSays(now.devices[Number(device.dataset.device)]).split(", "));
    else context.tip.hide();
  });
  focus.addEventListener("pointerleave", () => context.tip.hide());
  const openCell = ([i, j]) => {
    if (!spec.cell || !now || !now.matrix) return;
    const [down, right] = store.of(spec.tensor).axes;
    context.open({ [down]: i, [right]: j });
  };
  focus.addEventListener("click", (event) => {
    const at = event.target.closest?.("[data-cell]");
    if (at) openCell(at.dataset.cell.split(" ").map(Number));
  });
  focus.addEventListener("blur", () => {
    cell = null;
    redraw();
  });
  focus.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!now) return;
    if (event.key in moves) {
      const last = now.chunks.length - 1;
      const [down, right] = cell ? moves[event.key] : [0, 0];
      const from = cell || [0, 0];
      cell = [Math.max(0, Math.min(last, from[0] + down)), Math.max(0, Math.min(last, from[1] + right))];
      redraw();
      context.announce(cellSays(...cell).join(", "));
    } else if (event.key === "Enter" && cell) openCell(cell);
    else return;
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
      columns: ["device", "state", "works with the block of", "on its way to it"],
      rows: (now ? now.devices : []).map(({ i, state, block, coming, share }) => [i, STATE_SAYS[state], block, coming < 0 ? "–" : `${coming} (${Math.round(share * 100)}%)`]),
    }),
  };
}
