/**
 * The layers of a model, the first at the bottom: what each is, whose cache it reads, what it stores, what works now.
 */
import { draw, make } from "./dom.js";
import { enlargement } from "./glass.js";
import { format } from "./text.js";

const LAYER = 34;
const BETWEEN = 8;
const MOST = 640; // pixels: more layers than fit get thinner ones

export function stack(host, spec, context) {
  const { store } = context;
  const picture = draw("svg", { role: "img", class: "stack" });
  const legend = make("div", { class: "legend" }, spec.kinds.map((kind, i) => make("span", { class: `key fill-${colourOf(spec, i)}` }, make("span", { class: "key-text" }, kind))));
  host.append(picture, context.bare || spec.kinds.length < 2 ? "" : legend);
  let step = 0;
  let key = "";
  let layers = [];

  const row = (tensor) => store.newest(tensor, step);

  const read = () => {
    const codes = row(spec.codes);
    if (!codes) return null;
    const [reads, values, lit] = [row(spec.reads), row(spec.values), row(spec.lit)];
    return codes.map((code, i) => ({ i, code, reads: reads ? reads[i] : -1, value: values ? values[i] : null, lit: lit ? lit[i] : 1 }));
  };

  const paint = () => {
    const width = host.clientWidth;
    const thick = Math.max(9, Math.min(LAYER, MOST / layers.length - BETWEEN));
    const pitch = thick + Math.min(BETWEEN, thick / 3);
    const height = layers.length * pitch + 22;
    const y = (i) => height - (i + 1) * pitch - 2;
    const wide = spec.reads || spec.values;
    const box = wide ? width * 0.44 : width - 90;
    const x0 = context.bare ? 4 : 30;
    const cacheX = width * 0.62;
    const most = Math.max(1e-9, ...layers.map(({ value }) => value || 0));
    const nodes = [];
    if (wide && !context.bare) {
      nodes.push(draw("text", { x: x0, y: 10, class: "routes-head" }, "layer"));
      nodes.push(draw("text", { x: cacheX, y: 10, class: "routes-head" }, spec.values_label || "its cache"));
    }
    for (const { i, code, reads, value, lit } of layers) {
      const colour = colourOf(spec, code);
      const middle = y(i) + thick / 2;
      nodes.push(draw("rect", { x: x0, y: y(i), width: box - x0, height: thick, rx: 5, class: `stack-layer fill-${colour}`, style: { opacity: String(0.22 + 0.78 * lit) } }));
      if (!context.bare) nodes.push(draw("text", { x: x0 - 6, y: middle, class: "routes-label", "text-anchor": "end", "dominant-baseline": "central" }, String(i)));
      if (!context.bare && thick > 16) nodes.push(draw("text", { x: x0 + 10, y: middle, class: "stack-name", "dominant-baseline": "central" }, spec.kinds[code] || String(code)));
      if (spec.values) {
        const room = width - cacheX - (context.bare ? 4 : 74);
        if (value) nodes.push(draw("rect", { x: cacheX, y: y(i) + thick * 0.18, width: Math.max(3, (room * value) / most), height: thick * 0.64, rx: 3, class: "fill-key stack-cache" }));
        if (!context.bare) nodes.push(draw("text", { x: cacheX + (value ? (room * value) / most : 0) + 6, y: middle, class: "routes-label", "dominant-baseline": "central" }, value ? format(value, spec.values_format) : "none"));
      }
      if (reads >= 0 && wide) {
        const to = y(reads) + thick / 2;
        const bend = (cacheX - box) * 0.5;
        nodes.push(draw("path", { d: `M${box + 2} ${middle} C${box + bend} ${middle} ${cacheX - bend} ${to} ${cacheX - 5} ${to}`, class: "stack-read" }));
      }
    }
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.style.height = `${height}px`;
    picture.replaceChildren(...nodes);
    picture.setAttribute("aria-label", `${spec.title}, from the first layer up: ${layers.map(sentence).join("; ")}`);
  };

  const sentence = ({ i, code, reads, value, lit }) =>
    [`layer ${i}, ${spec.kinds[code]}`, spec.reads ? (reads < 0 ? "reads no cache" : `reads the cache of layer ${reads}`) : "", spec.values ? `stores ${format(value || 0, spec.values_format)}` : "", spec.lit ? `${spec.lit_label || "at work"} ${format(lit, ".0%")}` : ""].filter(Boolean).join(", ");

  const redraw = () => {
    layers = read() || [];
    if (!layers.length || !host.clientWidth) return false;
    const wanted = `${JSON.stringify(layers)} ${host.clientWidth} ${context.theme}`;
    if (wanted !== key) {
      key = wanted;
      paint();
    }
    return true;
  };

  picture.addEventListener("pointermove", (event) => {
    const rect = picture.getBoundingClientRect();
    const i = Math.floor(((rect.bottom - event.clientY - 2 * enlargement()) / (rect.height - 22 * enlargement())) * layers.length);
    if (layers[i]) context.tip.near(event, sentence(layers[i]).split(", "));
    else context.tip.hide();
  });
  picture.addEventListener("pointerleave", () => context.tip.hide());

  return {
    draw(now) {
      step = now;
      return redraw();
    },
    resize() {
      key = "";
      redraw();
    },
    dispose() {
      picture.remove();
      legend.remove();
    },
    table: () => ({
      columns: ["layer", "kind", "reads", spec.values_label || "stores", spec.lit_label || "at work"],
      rows: layers.map(({ i, code, reads, value, lit }) => [i, spec.kinds[code], reads < 0 ? "–" : reads, value === null ? "" : format(value, spec.values_format), spec.lit ? format(lit, ".0%") : ""]),
    }),
  };
}

function colourOf(spec, code) {
  return spec.colours[code] || ["query", "recent", "recomputed", "value", "sink", "heavy"][code % 6];
}
