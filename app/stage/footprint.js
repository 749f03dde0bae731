/**
 * What designs keep of a token, layer by layer, as strips on one scale: a strip that shrinks is seen to shrink, and
 * what it was at its longest stays as the ground beneath it.
 */
import { make, say } from "./dom.js";
import { within } from "./glass.js";
import { format } from "./text.js";

const PART_GAP = 3; // pixels between two layers
const RULED_CELL = 4; // a head's share of a strip that is narrower is not ruled

export function footprint(host, spec, context) {
  const { store } = context;
  const list = make("div", { class: "footprint" });
  host.append(list);
  let step = 0;

  const strips = spec.holdings.map((holding) => {
    const bar = make("div", { class: `footprint-bar fill-${holding.colour}` });
    const ground = make("div", { class: "footprint-ground", role: "img" }, bar);
    const total = make("div", { class: "figure" });
    const figure = make("div", { class: "figure" });
    const row = make(
      "div",
      { class: "strip" },
      context.bare ? null : make("div", { class: "strip-name" }, make("div", { class: "strip-label" }, holding.label), make("div", { class: "strip-detail" }, holding.detail)),
      make("div", { class: "strip-slots" }, ground),
      context.bare ? null : make("div", { class: "strip-number" }, total, make("div", { class: "small" }, spec.unit)),
      holding.figure && !context.bare ? make("div", { class: "strip-number footprint-figure" }, figure, make("div", { class: "small" }, holding.figure_label)) : null,
    );
    list.append(row);
    const strip = { holding, bar, ground, total, figure, row, parts: [], value: null };
    ground.addEventListener("pointermove", (event) => hover(strip, event));
    ground.addEventListener("pointerleave", () => context.tip.hide());
    return strip;
  });

  const sum = (values) => values.reduce((a, b) => a + b, 0);

  /** The longest strip of the whole run, past and to come: one scale, so that lengths compare. */
  const longest = () => {
    const all = spec.holdings.flatMap(({ parts }) => {
      const track = store.of(parts);
      return track ? Array.from({ length: track.count }, (_, r) => sum(track.numbers(r))) : [];
    });
    return Math.max(1e-9, ...all);
  };

  const paint = (strip, most, grain) => {
    const { bar, parts, ground } = strip;
    while (bar.children.length < parts.length) bar.append(make("span", { class: "footprint-part" }));
    while (bar.children.length > parts.length) bar.lastChild.remove();
    const room = ground.clientWidth;
    parts.forEach((value, i) => {
      const { style } = bar.children[i];
      style.width = `${Math.max(0, (room * value) / most - (value ? PART_GAP : 0))}px`;
      style.marginRight = value ? `${PART_GAP}px` : "0";
      const ruled = grain && value > grain && (room * grain) / most >= RULED_CELL;
      style.setProperty("--cell", ruled ? `${(100 * grain) / value}%` : "200%");
    });
    const layers = parts.filter((value) => value > 0).length;
    ground.setAttribute("aria-label", `${strip.holding.label}: ${format(sum(parts), ",.0f")} ${spec.unit}, kept by ${layers} of ${parts.length} layers`);
  };

  const hover = (strip, event) => {
    if (!strip.parts.length) return;
    const x = within(event, strip.ground).x;
    const i = [...strip.bar.children].findIndex((part) => x < part.offsetLeft - strip.bar.offsetLeft + part.offsetWidth + PART_GAP && part.offsetWidth);
    if (i < 0) context.tip.near(event, ["no longer kept", `${strip.holding.label} keeps ${format(sum(strip.parts), ",.0f")} ${spec.unit}`]);
    else context.tip.near(event, [`${format(strip.parts[i], ",.0f")} ${spec.unit}`, `layer ${i} of ${strip.holding.label}`]);
  };

  const draw = (now) => {
    step = now;
    if (!host.clientWidth) return false;
    const most = longest();
    const grain = store.newest(spec.grain, now);
    return strips
      .map((strip) => {
        strip.parts = store.newest(strip.holding.parts, now) || [];
        strip.value = store.newest(strip.holding.figure, now);
        strip.row.classList.toggle("coming", !strip.parts.length);
        say(strip.total, strip.parts.length ? format(sum(strip.parts), ",.0f") : "…");
        say(strip.figure, strip.value && !Number.isNaN(strip.value[0]) ? format(strip.value[0], strip.holding.figure_format) : "…");
        paint(strip, most, grain ? grain[0] : 0);
        return strip.parts.length > 0;
      })
      .some(Boolean);
  };

  return {
    draw,
    resize() {
      draw(step);
    },
    dispose() {
      list.remove();
    },
    table: () => ({
      columns: ["design", spec.unit, ...(spec.holdings.some(({ figure }) => figure) ? [spec.holdings[0].figure_label || "figure"] : []), "layer by layer"],
      rows: strips.map(({ holding, parts, value }) => [
        holding.label,
        parts.length ? format(sum(parts), ",.0f") : "…",
        ...(spec.holdings.some(({ figure }) => figure) ? [value ? format(value[0], holding.figure_format) : "…"] : []),
        parts.map((part) => format(part, ",.0f")).join(" "),
      ]),
    }),
  };
}
