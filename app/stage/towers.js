/**
 * One model several times over, side by side: in each tower what is trained is lit, what is frozen is not. Every box is as
 * wide as the root of the parameters in it; a lit one is the brighter the further it has moved.
 */
import { draw, make, say } from "./dom.js";
import { format } from "./text.js";

const TOWER_ROW = 36; // pixels of a layer
const TOWER_MOST = 300; // of all of them: of a deep model each layer is thinner
const TOWER_GAP = 1.5;
const DIMMEST = 0.3;

export function towers(host, spec, context) {
  const { store } = context;
  const list = make("div", { class: "towers" });
  const legend = make("div", { class: "legend" },
    make("span", { class: "key towers-lit" }, make("span", { class: "key-text" }, "trained")),
    make("span", { class: "key towers-frozen" }, make("span", { class: "key-text" }, "frozen")),
    make("span", { class: "key-text" }, spec.key));
  host.append(list, context.bare ? "" : legend);
  let step = 0;

  const all = spec.towers.map((tower, i) => {
    const picture = draw("svg", { class: "tower-picture", role: "img" });
    const figure = make("div", { class: `figure tower-figure ink-${tower.colour}` });
    const share = make("div", { class: "small" });
    const node = make("div", { class: `tower fill-${tower.colour}` }, picture,
      context.bare ? null : [make("div", { class: `tower-label ink-${tower.colour}` }, tower.label), figure, share, make("div", { class: "small faint" }, tower.detail)]);
    list.append(node);
    picture.addEventListener("pointermove", (event) => hover(i, event));
    picture.addEventListener("pointerleave", () => context.tip.hide());
    return { tower, picture, figure, share, node, shown: "", rows: null };
  });

  /** [row][part] {trained, frozen, moved}: the parts as they were counted, row by row from the bottom. */
  const read = ({ counts, moved }) => {
    const found = store.at(counts, step);
    if (!found) return null;
    const { track, r } = found;
    const [places, parts] = track.row(r).shape;
    const far = store.at(moved, step);
    const one = (i, j) => {
      const at = (i * parts + j) * 2;
      return { trained: track.value(r, at), frozen: track.value(r, at + 1), moved: far ? far.track.value(far.r, i * parts + j) : 1 };
    };
    return Array.from({ length: places }, (_, i) => Array.from({ length: parts }, (__, j) => one(i, j)));
  };

  const span = (row) => row.reduce((sum, { trained, frozen }) => sum + Math.sqrt(trained) + Math.sqrt(frozen), 0);
  const size = (row) => row.reduce((sum, { trained, frozen }) => sum + trained + frozen, 0);

  /** How tall each row of a tower is: one of few parameters is lower. */
  const heightsOf = (rows, largest) => {
    const thick = Math.min(TOWER_ROW, TOWER_MOST / rows.length);
    return rows.map((row) => thick * 0.85 * Math.min(1, Math.max(0.2, Math.sqrt(size(row) / largest))));
  };
  const gapOf = (rows) => Math.min(4, TOWER_MOST / rows.length / 5);
  const towering = (rows, largest) => heightsOf(rows, largest).reduce((sum, tall) => sum + tall + gapOf(rows), 0);

  const paint = (entry, widest, largest, height) => {
    const { picture, rows } = entry;
    const width = picture.clientWidth || 120;
    const heights = heightsOf(rows, largest);
    let y = height;
    entry.edges = [];
    const nodes = rows.flatMap((row, i) => {
      const h = heights[i];
      y -= h + gapOf(rows);
      entry.edges.push(y);
      let x = 0;
      return row.flatMap(({ trained, frozen, moved }, j) => [["frozen", frozen], ["lit", trained]].filter(([, count]) => count > 0).map(([kind, count]) => {
        const w = Math.max(1.5, (width * Math.sqrt(count)) / widest - TOWER_GAP);
        const box = draw("rect", { x, y, width: w, height: h, rx: Math.min(2, w / 3), class: `tower-box ${kind}`, "data-part": j, style: kind === "lit" ? { opacity: String(DIMMEST + (1 - DIMMEST) * Math.sqrt(moved)) } : {} });
        x += w + TOWER_GAP;
        return box;
      }));
    });
    entry.height = height;
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.style.height = `${height}px`;
    picture.replaceChildren(...nodes);
  };

  const nameOf = (rows, i) => (i === 0 ? spec.first : i === rows.length - 1 ? spec.last : `layer ${i - 1}`);

  const hover = (n, event) => {
    const entry = all[n];
    if (!entry.rows) return;
    const rect = entry.picture.getBoundingClientRect();
    const y = ((event.clientY - rect.top) / rect.height) * entry.height;
    const i = entry.edges.findIndex((edge) => y >= edge);
    if (i < 0) return context.tip.hide();
    const told = entry.rows[i].map(({ trained, frozen }, j) => (trained + frozen ? `${i === 0 ? spec.first_parts[j] : spec.parts[j]}: ${format(trained, ",.0f")} of ${format(trained + frozen, ",.0f")} trained` : "")).filter(Boolean);
    context.tip.near(event, [`${entry.tower.label}, ${nameOf(entry.rows, i)}`, ...told]);
    return undefined;
  };

  const figures = ({ tower }) => ["trained", "share"].map((name) => {
    const track = store.of(tower[name]);
    return track ? track.scalarAt(step) : null;
  });

  const redraw = () => {
    for (const entry of all) entry.rows = read(entry.tower);
    const there = all.filter(({ rows }) => rows);
    if (!there.length || !host.clientWidth) return false;
    const widest = Math.max(...there.flatMap(({ rows }) => rows.map(span)));
    const largest = Math.max(...there.flatMap(({ rows }) => rows.map(size)));
    const height = Math.max(...there.map(({ rows }) => towering(rows, largest)));
    for (const entry of all) {
      entry.node.hidden = !entry.rows;
      if (!entry.rows) continue;
      const wanted = `${JSON.stringify(entry.rows)} ${widest} ${height} ${host.clientWidth} ${context.theme}`;
      const [trained, share] = figures(entry);
      say(entry.figure, format(trained, ",.0f"));
      say(entry.share, share === null ? "" : `${format(share, share < 0.01 ? ".2%" : ".1%")} ${spec.share_label}`);
      if (wanted === entry.shown) continue;
      entry.shown = wanted;
      paint(entry, widest, largest, height);
      entry.picture.setAttribute("aria-label", `${entry.tower.label}: ${format(trained, ",.0f")} parameters are trained; ${entry.rows.filter((row) => row.some((part) => part.trained)).length} of ${entry.rows.length} places from the bottom up have some`);
    }
    return true;
  };

  return {
    draw(now) {
      step = now;
      return redraw();
    },
    resize() {
      for (const entry of all) entry.shown = "";
      redraw();
    },
    dispose() {
      list.remove();
      legend.remove();
    },
    table: () => ({
      columns: ["method", "place", "part", "trained", "frozen"],
      rows: all.filter(({ rows }) => rows).flatMap(({ tower, rows }) => rows.flatMap((row, i) => row.flatMap(({ trained, frozen }, j) =>
        (trained + frozen ? [[tower.label, nameOf(rows, i), i === 0 ? spec.first_parts[j] : spec.parts[j], format(trained, ",.0f"), format(frozen, ",.0f")]] : [])))),
    }),
  };
}
