/**
 * Guesses that hang on a text as a tree: each place of the text a column, each word at its place; the check marks them
 * by shape as well as colour, and what it did not keep fades. Beside it, which of them see which.
 */
import { draw, fill, make } from "./dom.js";
import { within } from "./glass.js";
import { short, visible } from "./text.js";

const FATES = ["coming", "text", "guessed", "accepted", "rejected", "skipped", "corrected", "more"];
const FATE_WORDS = {
  text: "the text", guessed: "guessed, not checked yet", accepted: "accepted", rejected: "rejected",
  skipped: "never looked at", corrected: "the target’s own word instead", more: "the target’s own word, on top",
};
const FATE_MARKS = {
  text: "", guessed: "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0", accepted: "M-4.5 0.5L-1.5 3.5L4.5 -4", rejected: "M-4 -4L4 4M4 -4L-4 4",
  skipped: "M-4 0H4", corrected: "M4 -3.5H-1A3 3 0 0 0 -1 3.5H4M1.5 1L4 3.5L1.5 6", more: "M-4.5 0H4.5M0 -4.5V4.5",
};
const TREE_LEAF = 50; // pixels from one leaf to the next
const TREE_CHIP = 29;
const TREE_LETTER = 7.9; // pixels wide at 13 px
const TREE_MARK_ROOM = 21;
const TREE_FOOT = 44; // for the positions
const TREE_WIDE = 720; // pixels from which on the mask stands beside the tree

export function guessTree(host, spec, context) {
  const { store } = context;
  const picture = draw("svg", { role: "img", class: "tree" });
  const masking = draw("svg", { role: "img", class: "tree-mask" });
  const scroll = make("div", { class: "tree-scroll", role: "group", tabindex: context.bare ? null : 0, "aria-label": "Guesses: move with the arrow keys" }, picture);
  const beside = make("figure", { class: "tree-beside" }, make("figcaption", { class: "small" }, "Who sees whom in the one pass"), masking);
  const both = make("div", { class: "tree-both" }, scroll, spec.mask && !context.bare ? beside : "");
  const legend = make("div", { class: "legend" });
  host.append(both, context.bare ? "" : legend);
  let step = 0;
  let chosen = -1;
  let nodes = [];
  let seen = null; // rows of the mask
  let shape = "";
  let look = "";

  const wordOf = (id) => visible(store.words.get(id)) || (store.words.has(id) ? "␣" : `#${id}`);

  const read = () => {
    const ids = store.newest(spec.tensor, step);
    const parents = store.newest(spec.parents, step);
    const fates = store.newest(spec.states, step);
    const [places, p, q] = [spec.positions, spec.p, spec.q].map((tensor) => store.newest(tensor, step) || []);
    if (!ids || !parents || !fates) return [];
    const found = ids.map((id, i) => ({ i, word: wordOf(id), parent: parents[i], fate: FATES[fates[i]] || "guessed", place: places[i], p: p[i], q: q[i], children: [] }));
    found.forEach((node) => {
      node.depth = node.parent < 0 ? 0 : found[node.parent].depth + 1;
      if (node.parent >= 0) found[node.parent].children.push(node);
    });
    return found;
  };

  /** Where each node stands: columns by depth, leaves one below the other, a parent in the middle of its children. */
  const arrangeTree = () => {
    const columns = Math.max(...nodes.map(({ depth }) => depth)) + 1;
    const wide = host.clientWidth >= TREE_WIDE && spec.mask && !context.bare;
    const room = Math.max(240, host.clientWidth - (wide ? maskSide() + 28 : 0));
    const column = Math.max(room < 420 ? 62 : 84, Math.min(150, room / columns));
    let leaves = 0;
    const visit = (node) => {
      node.x = column * (node.depth + 0.5);
      if (!node.children.length) node.y = TREE_LEAF * (leaves++ + 0.5);
      else {
        node.children.forEach(visit);
        node.y = (node.children[0].y + node.children[node.children.length - 1].y) / 2;
      }
      const letters = Math.floor((column - 10 - TREE_MARK_ROOM) / TREE_LETTER);
      node.shown = node.word.length > letters ? `${node.word.slice(0, Math.max(1, letters - 1))}…` : node.word;
      node.wide = Math.min(column - 4, TREE_MARK_ROOM + 9 + TREE_LETTER * node.shown.length);
    };
    nodes.filter(({ parent }) => parent < 0).forEach(visit);
    return { column, columns, width: column * columns, height: TREE_LEAF * leaves + (context.bare ? 4 : TREE_FOOT) };
  };

  const maskSide = () => Math.min(330, Math.max(250, host.clientWidth * 0.34));

  const wirePath = (node, from) => {
    const [x1, x2] = [from.x + from.wide / 2, node.x - node.wide / 2];
    const bend = Math.max(6, (x2 - x1) / 2);
    return `M${x1} ${from.y}C${x1 + bend} ${from.y} ${x2 - bend} ${node.y} ${x2} ${node.y}`;
  };

  const chipOf = (node) => {
    const left = -node.wide / 2;
    return draw("g", { class: "tree-node", "data-node": node.i, transform: `translate(${node.x} ${node.y})` },
      draw("rect", { class: "tree-halo", x: left - 3, y: -TREE_CHIP / 2 - 3, width: node.wide + 6, height: TREE_CHIP + 6, rx: 9 }),
      draw("rect", { class: "tree-chip", x: left, y: -TREE_CHIP / 2, width: node.wide, height: TREE_CHIP, rx: 6 }),
      draw("path", { class: "tree-mark", transform: `translate(${left + 12} 0)` }),
      draw("text", { class: "tree-word", x: left + (node.fate === "text" ? 9 : TREE_MARK_ROOM + 2), y: 0, "dominant-baseline": "central" }, node.shown),
      context.bare ? "" : draw("text", { class: "tree-odds", x: 0, y: TREE_CHIP / 2 + 9, "text-anchor": "middle", "dominant-baseline": "central" }));
  };

  /** A new tree: its elements from scratch. */
  const plant = () => {
    const plan = arrangeTree();
    const wires = nodes.filter(({ parent }) => parent >= 0).map((node) => draw("path", { class: "tree-wire", "data-wire": node.i, d: wirePath(node, nodes[node.parent]) }));
    const foot = plan.height - TREE_FOOT + 6;
    const axis = context.bare ? [] : Array.from({ length: plan.columns }, (_, depth) => {
      const at = nodes.find((node) => node.depth === depth);
      const x = plan.column * (depth + 0.5);
      return [
        draw("line", { class: "tree-guide", x1: x, x2: x, y1: 0, y2: foot + 6 }),
        draw("text", { class: "tree-place", x, y: foot + 16, "text-anchor": "middle" }, Number.isFinite(at?.place) ? String(at.place) : ""),
      ];
    });
    const caption = context.bare ? "" : draw("text", { class: "tree-caption", x: 2, y: plan.height - 4 }, "position id: one for all words of a column");
    picture.replaceChildren(...axis.flat(), ...wires, ...nodes.map(chipOf), caption);
    picture.setAttribute("viewBox", `0 0 ${plan.width} ${plan.height}`);
    const by = context.bare ? Math.min(1, (context.height || 170) / plan.height, host.clientWidth / plan.width) : 1;
    picture.style.width = `${plan.width * by}px`;
    picture.style.height = `${plan.height * by}px`;
  };

  const lineage = (i) => {
    const found = new Set();
    for (let at = i; at >= 0 && nodes[at]; at = nodes[at].parent) found.add(at);
    return found;
  };

  /** The same tree, further on: what became of each node, and what is pointed at. */
  const dressTree = () => {
    const line = lineage(chosen);
    for (const element of picture.querySelectorAll(".tree-node")) {
      const node = nodes[Number(element.dataset.node)];
      element.setAttribute("class", `tree-node fate-${node.fate}${spec.cell ? " opens" : ""}${line.has(node.i) ? " lit" : ""}${node.i === chosen ? " chosen" : ""}`);
      element.querySelector(".tree-mark").setAttribute("d", FATE_MARKS[node.fate] || "");
      const odds = element.querySelector(".tree-odds");
      if (odds) odds.textContent = ["accepted", "rejected", "skipped"].includes(node.fate) && Number.isFinite(node.p) ? node.p < 0.001 ? (node.wide < 56 ? "p<.001" : "p < 0.001") : `p ${Number(node.p.toPrecision(2))}` : "";
    }
    for (const element of picture.querySelectorAll(".tree-wire")) {
      const node = nodes[Number(element.dataset.wire)];
      element.setAttribute("class", `tree-wire fate-${node.fate}${line.has(node.i) ? " lit" : ""}`);
    }
    paintMask(line);
    picture.setAttribute("aria-label", describeTree());
    const there = FATES.filter((fate) => fate !== "coming" && fate !== "text" && nodes.some((node) => node.fate === fate));
    fill(legend, there.map((fate) => make("span", { class: "tree-key" },
      draw("svg", { class: `fate-${fate}`, viewBox: "-9 -9 18 18", width: 18, height: 18, "aria-hidden": "true" }, draw("rect", { class: "tree-chip", x: -8, y: -8, width: 16, height: 16, rx: 4 }), draw("path", { class: "tree-mark", d: FATE_MARKS[fate] })),
      make("span", { class: "key-text" }, FATE_WORDS[fate]))));
  };

  const maskPlan = () => {
    const count = seen.length;
    const label = count > 24 ? 8 : 60;
    const side = host.clientWidth >= TREE_WIDE ? maskSide() : Math.min(host.clientWidth, 360);
    return { count, label, cell: Math.max(5, Math.min(24, (side - label - 28) / count)) };
  };

  const paintMask = (line) => {
    beside.hidden = !seen;
    if (!seen) return;
    const { count, label, cell } = maskPlan();
    const gap = cell > 9 ? 1.5 : 0.5;
    const square = (i, j) => `M${label + j * cell} ${label + i * cell}h${cell - gap}v${cell - gap}h${gap - cell}z`;
    const kinds = { own: "", sees: "", blind: "" };
    for (let i = 0; i < count; i += 1) {
      if (nodes[i]?.fate === "coming") continue;
      for (let j = 0; j < count; j += 1) kinds[i === j ? "own" : seen[i][j] > 0.5 ? "sees" : "blind"] += square(i, j);
    }
    const names = cell < 10 ? [] : nodes.slice(0, count).filter(({ fate }) => fate !== "coming").flatMap((node) => {
      const at = label + (node.i + 0.5) * cell;
      const lit = node.i === chosen ? " lit" : "";
      const name = node.word.length > 7 ? `${node.word.slice(0, 6)}…` : node.word;
      return [
        draw("text", { class: `tree-name${lit}`, x: label - 5, y: at, "text-anchor": "end", "dominant-baseline": "central" }, name),
        draw("text", { class: `tree-name${line.has(node.i) ? " lit" : ""}`, transform: `translate(${at} ${label - 5}) rotate(-60)`, "dominant-baseline": "central" }, name),
      ];
    });
    const row = chosen >= 0 && chosen < count ? draw("rect", { class: "tree-row", x: label - 2, y: label + chosen * cell - 2, width: count * cell + 3, height: cell + 3, rx: 3 }) : "";
    masking.replaceChildren(...Object.entries(kinds).map(([kind, d]) => draw("path", { class: `tree-cell-${kind}`, d })), ...names, row);
    const [across, down] = [label + count * cell + 26, label + count * cell + 4]; // names of columns lean to the right
    masking.setAttribute("viewBox", `0 0 ${across} ${down}`);
    masking.style.width = `${across}px`;
    masking.style.height = `${down}px`;
    masking.setAttribute("aria-label", `Each word sees the text, the words on its own path and itself: ${nodes.slice(1, 10).map((node) => `${node.word} sees ${[...lineage(node.parent)].reverse().map((i) => nodes[i].word).join(" ")}`).join("; ")}`);
  };

  const listed = (...fates) => nodes.filter(({ fate }) => fates.includes(fate)).map(({ word }) => word).join(", ");

  const describeTree = () => {
    const parts = [`${spec.title}. A tree of guesses after “${nodes[0].word}”`];
    for (const [name, ...fates] of [["guessed", "guessed"], ["accepted", "accepted"], ["rejected", "rejected"], ["never looked at", "skipped"], ["the target’s own word", "corrected", "more"]]) {
      const words = listed(...fates);
      if (words) parts.push(`${name}: ${words}`);
    }
    return parts.join("; ");
  };

  const keptOdds = ({ p, q }) => (Number.isFinite(p) && q > 0 ? Math.min(1, p / q) : null);

  const lines = (node) => [
    `${nodes[node.parent] ? `… ${nodes[node.parent].word} ` : ""}${node.word}`,
    `position ${node.place}; ${FATE_WORDS[node.fate] || ""}`,
    ...(Number.isFinite(node.p) ? [`p ${short(node.p)}${node.q > 0 ? `, q ${short(node.q)}, min(1, p/q) ${short(keptOdds(node))}` : ""}`] : []),
  ];

  const redraw = () => {
    nodes = read();
    if (!nodes.length || !host.clientWidth) return false;
    const frame = spec.mask ? store.frame(spec.mask, step) : null;
    seen = frame && frame.slice(0, frame[0].length); // smaller ones lie padded in larger ones
    const wanted = `${nodes.map(({ word, parent, place }) => `${word} ${parent} ${place}`).join()} ${host.clientWidth}`;
    if (wanted !== shape) {
      shape = wanted;
      if (chosen >= nodes.length) chosen = -1;
      plant();
      look = "";
    } else arrangeTree();
    const now = `${nodes.map(({ fate, p }) => `${fate} ${p}`).join()} ${chosen} ${context.theme} ${seen?.length}`;
    if (now !== look) {
      look = now;
      dressTree();
    }
    return true;
  };

  const choose = (i) => {
    if (i === chosen) return;
    chosen = i;
    redraw();
  };

  const there = (node) => node && node.fate !== "coming";
  const point = (event, i) => {
    choose(there(nodes[i]) ? i : -1);
    if (chosen >= 0) context.tip.near(event, lines(nodes[chosen]));
    else context.tip.hide();
  };
  const under = (event) => {
    const found = event.target.closest?.("[data-node]");
    return found ? Number(found.dataset.node) : -1;
  };
  const openNode = (i) => spec.cell && there(nodes[i]) && nodes[i].parent >= 0 && context.open({ node: i });

  picture.addEventListener("pointermove", (event) => point(event, under(event)));
  picture.addEventListener("click", (event) => openNode(under(event)));
  masking.addEventListener("pointermove", (event) => {
    const { label, cell, count } = maskPlan();
    const row = Math.floor((within(event, masking).y - label) / cell);
    point(event, row >= 0 && row < count ? row : -1);
  });
  for (const element of [picture, masking]) element.addEventListener("pointerleave", () => point(null, -1));
  scroll.addEventListener("blur", () => point(null, -1));
  scroll.addEventListener("keydown", (event) => {
    if (!nodes.length) return;
    const now = nodes[chosen];
    const level = now ? nodes.filter((node) => node.depth === now.depth && there(node)) : [];
    const next = {
      ArrowRight: () => (now ? now.children.find(there) || now : nodes[0]),
      ArrowLeft: () => (now ? nodes[now.parent] || now : nodes[0]),
      ArrowDown: () => (now ? level[level.indexOf(now) + 1] || now : nodes[0]),
      ArrowUp: () => (now ? level[level.indexOf(now) - 1] || now : nodes[0]),
    }[event.key];
    if (next && !event.altKey && !event.ctrlKey && !event.metaKey) {
      choose(next().i);
      context.announce(lines(nodes[chosen]).join(", "));
      const box = picture.querySelector(`[data-node="${chosen}"]`).getBoundingClientRect();
      context.tip.near({ clientX: box.right, clientY: box.bottom }, lines(nodes[chosen]));
    } else if (event.key === "Enter" && now) openNode(chosen);
    else if (event.key === "Escape" && now) point(null, -1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  return {
    draw(now) {
      step = now;
      return redraw();
    },
    resize() {
      shape = "";
      redraw();
    },
    dispose() {
      both.remove();
      legend.remove();
    },
    table: () => ({
      columns: ["guess", "after", "position", "p", "q", "min(1, p/q)", "what became of it"],
      rows: nodes.filter((node) => node.parent >= 0 && there(node)).map((node) => [node.word, nodes[node.parent].word, node.place, ...[node.p, node.q || NaN, keptOdds(node)].map((x) => (Number.isFinite(x) ? short(x) : "")), FATE_WORDS[node.fate]]),
    }),
  };
}
