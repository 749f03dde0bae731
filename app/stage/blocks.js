/**
 * Page tables over a pool of blocks: above, a row of entries for each text; below, the blocks with the words that their
 * slots hold; between them the arrows. What changed in a step is said in words, and set off in the picture.
 */
import { draw, make, say } from "./dom.js";
import { hueOf, letterOf } from "./owners.js";
import { visible } from "./text.js";

const ROW_TALL = 28;
const BOX_LEAST = 78;
const BOX_GAP = 9;
const SLOT_TALL = 16;
const BOX_HEAD = 22;
const BETWEEN_ROWS = 58; // the arrows' room between tables and blocks
const LETTER = 6.4; // pixels of a letter of the small mono face
const SAID = 4; // sentences about one step
const WAITING = 1;
const RUNNING = 2;
const AWAY = 3;
const DONE = 4;
const STATE_WORDS = ["not here yet", "waits", "", "sent away", "done"];
const HELD = 1;
const DROPPED = 2;
const LEFT = 3; // what a text that is gone left in a free block

export function blocks(host, spec, context) {
  const { store } = context;
  const said = make("div", { class: "blocks-said" });
  const picture = draw("svg", { role: "img", class: "blocks" });
  const list = make("div", { class: "blocks-focus", role: "group", tabindex: context.bare ? null : 0, "aria-label": `${spec.title}: texts` }, picture);
  host.append(context.bare ? "" : said, list);
  let step = 0;
  let key = "";
  let now = null;
  let chosen = -1;

  const word = (id) => (store.words.has(id) ? visible(store.words.get(id)) || "⏎" : id === -2 ? "·" : "");

  const read = (at) => {
    const tables = store.frame(spec.tensor, at);
    const [states, families, refs, free] = [spec.states, spec.families, spec.refs, spec.free].map((t) => store.frame(t, at)?.[0]);
    const [slots, tokens] = [store.frame(spec.slots, at), store.frame(spec.tokens, at)];
    if (!tables || !states || !refs || !slots || !tokens) return null;
    const texts = tables.map((row, i) => {
      const end = row.indexOf(-2);
      return { i, name: letterOf(families || [], i), state: states[i], entries: end < 0 ? row : row.slice(0, end) };
    });
    const boxes = refs.map((count, b) => ({
      b,
      refs: count,
      owners: texts.filter(({ entries }) => entries.includes(b)).map(({ i }) => i),
      slots: slots[b].map((code, place) => ({ code, id: tokens[b][place] })),
    }));
    return { texts, boxes, free: free || [], room: tables[0].length };
  };

  const redraw = () => {
    const wanted = `${step} ${host.clientWidth} ${chosen} ${context.theme} ${store.words.size} ${store.of(spec.tensor)?.version}`;
    if (wanted === key && now) return true;
    now = read(step);
    if (!now || !host.clientWidth) return false;
    key = wanted;
    const before = step > 0 ? read(step - 1) : null;
    const change = changes(before, now);
    say(said, change.sentences.length > SAID ? `${change.sentences.slice(0, SAID).join(" ")} …` : change.sentences.join(" ") || "Nothing changes hands.");
    paint(change);
    const free = now.boxes.filter(({ refs }) => !refs).length;
    const held = now.texts.filter(({ state }) => state === RUNNING).map(describe);
    picture.setAttribute("aria-label", `${spec.title}. ${held.join("; ") || "no text is running"}; ${free} of ${now.boxes.length} blocks are free`);
    return true;
  };

  const describe = ({ name, state, entries }) =>
    state === RUNNING ? `${name}: blocks ${entries.map((b) => (b < 0 ? "none" : b)).join(", ")}` : `${name} ${STATE_WORDS[state]}`;

  const textOf = ({ entries }) => {
    const parts = entries.flatMap((b) => (b < 0 ? ["…"] : now.boxes[b].slots.filter(({ code }) => code === HELD).map(({ id }) => (store.words.get(id) ?? "").replace(/\s+/g, " "))));
    return parts.join(parts.some((part) => /^\s|\s$/.test(part)) ? "" : " "); // a tokenizer of whole words keeps no blanks
  };

  const paint = (change) => {
    const width = host.clientWidth;
    const label = width > 620 ? 104 : 62;
    const story = width > 760 ? Math.min(330, width * 0.36) : 0;
    const chip = Math.max(8, Math.min(38, (width - label - story) / now.room - 5));
    const head = context.bare ? 4 : 22;
    const rowY = (i) => head + i * ROW_TALL;
    const top = rowY(now.texts.length) + BETWEEN_ROWS;
    const size = now.boxes[0].slots.length;
    const most = Math.max(1, Math.floor((width + BOX_GAP) / (BOX_LEAST + BOX_GAP)));
    const shelves = Math.ceil(now.boxes.length / most);
    const across = Math.ceil(now.boxes.length / shelves);
    const wide = Math.min(132, (width - (across - 1) * BOX_GAP) / across);
    const tall = BOX_HEAD + size * SLOT_TALL + 5;
    const boxAt = (b) => [(b % across) * (wide + BOX_GAP), top + Math.floor(b / across) * (tall + BOX_GAP + 6)];
    const queueY = top + shelves * (tall + BOX_GAP + 6) + 4;
    const aside = (owners) => chosen >= 0 && !owners.includes(chosen);
    const tint = (owner) => context.colours.role(hueOf(owner));
    const scene = { width, label, story, chip, rowY, top, wide, tall, size, boxAt, queueY, aside, tint, change };
    const nodes = [draw("g", { class: "blocks-wires" }, now.texts.flatMap((text) => wiresOf(text, scene)))];
    nodes.push(...now.boxes.map((box) => boxOf(box, scene)), ...now.texts.map((text) => rowOf(text, scene)));
    nodes.push(...change.copies.map((copy) => copyOf(copy, scene)));
    if (!context.bare) nodes.push(...heads(scene), ...queueOf(scene));
    const height = context.bare ? queueY : queueY + 26;
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.style.height = `${height}px`;
    picture.replaceChildren(...nodes);
  };

  const heads = ({ label, top, width, size }) => [
    draw("text", { x: label, y: 12, class: "routes-head" }, width > 620 ? "page table: which block holds each run of its words" : "page table"),
    draw("text", { x: 0, y: top - 9, class: "routes-head blocks-halo" }, `the pool: ${now.boxes.length} blocks of ${size} ${size === 1 ? "slot" : "slots"}`),
  ];

  const chipX = (j, { label, chip }) => label + j * (chip + 5);

  const wiresOf = ({ i, entries }, scene) =>
    entries.map((b, j) => {
      if (b < 0) return null;
      const [x, y] = [chipX(j, scene) + scene.chip / 2, scene.rowY(i) + 24];
      const owners = now.boxes[b].owners;
      const [left, to] = scene.boxAt(b);
      const end = left + (scene.wide * (owners.indexOf(i) + 0.5)) / owners.length;
      const bend = Math.max(24, (to - y) * 0.45);
      const fresh = scene.change.fresh.has(`${i} ${j}`) ? " fresh" : "";
      return draw("path", { d: `M${x} ${y} C${x} ${y + bend} ${end} ${to - bend} ${end} ${to - 1}`, class: `blocks-wire${scene.aside([i]) ? " aside" : ""}${chosen === i ? " chosen" : ""}${fresh}`, style: { stroke: scene.tint(i) } });
    });

  const rowOf = (text, scene) => {
    const { i, name, state, entries } = text;
    const y = scene.rowY(i);
    const live = state === RUNNING;
    const nodes = [
      draw("rect", { x: 0, y: y - 2, width: scene.width, height: ROW_TALL, class: "blocks-hit" }),
      draw("rect", { x: 0, y: y + 2, width: 24, height: 20, rx: 6, class: live ? "blocks-badge" : "blocks-badge idle", style: { fill: live ? scene.tint(i) : null, stroke: scene.tint(i) } }),
      draw("text", { x: 12, y: y + 12.5, class: live ? "blocks-letter" : "blocks-letter idle", "text-anchor": "middle", "dominant-baseline": "central" }, name),
    ];
    if (!live && !context.bare) {
      const words = STATE_WORDS[state];
      nodes.push(draw("text", { x: 32, y: y + 12.5, class: `blocks-state blocks-halo${state === AWAY || state === WAITING ? " loud" : ""}`, "dominant-baseline": "central" }, words));
    }
    entries.forEach((b, j) => {
      const x = chipX(j, scene);
      const box = now.boxes[b];
      const held = box ? box.slots.filter(({ code }) => code === HELD).length / scene.size : 0;
      const fresh = scene.change.fresh.has(`${i} ${j}`) ? " fresh" : "";
      nodes.push(draw("rect", { x, y: y + 1, width: scene.chip, height: 22, rx: 4, class: `blocks-entry${b < 0 ? " gone" : ""}${fresh}`, style: { stroke: b < 0 ? null : scene.tint(i) }, "data-entry": j }));
      if (held) nodes.push(draw("rect", { x: x + 1.5, y: y + 18, width: Math.max(0, (scene.chip - 3) * held), height: 4, rx: 1.5, style: { fill: scene.tint(i) }, class: "blocks-through" }));
      if (scene.chip >= 15) nodes.push(draw("text", { x: x + scene.chip / 2, y: y + 10, class: "blocks-number", "text-anchor": "middle", "dominant-baseline": "central" }, b < 0 ? "–" : String(b)));
    });
    if (scene.story && live) {
      const start = chipX(now.room, scene) + 10;
      const room = Math.floor((scene.width - start) / LETTER);
      const whole = textOf(text);
      nodes.push(draw("text", { x: start, y: y + 12.5, class: "blocks-text", "dominant-baseline": "central" }, whole.length > room ? `…${whole.slice(1 - room)}` : whole));
    }
    return draw("g", { "data-text": i, class: `blocks-row${scene.aside([i]) ? " aside" : ""}` }, nodes);
  };

  const boxOf = (box, scene) => {
    const { b, refs, owners, slots } = box;
    const [x, y] = scene.boxAt(b);
    const { wide, tall } = scene;
    const share = wide / Math.max(1, owners.length);
    const nodes = [
      draw("rect", { x, y, width: wide, height: tall, rx: 7, class: `blocks-box${refs ? "" : " free"}${scene.change.taken.has(b) ? " fresh" : ""}${scene.change.freed.has(b) ? " freed" : ""}`, style: { stroke: owners.length === 1 ? scene.tint(owners[0]) : null } }),
      ...owners.map((owner, n) => draw("rect", { x: x + n * share + (n ? 1 : 3), y: y + 2, width: share - (owners.length > 1 ? 2 : 6), height: 4, rx: 2, style: { fill: scene.tint(owner) } })),
      draw("text", { x: x + 7, y: y + 14.5, class: "blocks-number", "dominant-baseline": "central" }, String(b)),
    ];
    if (!context.bare) nodes.push(draw("text", { x: x + wide - 7, y: y + 14.5, class: `blocks-refs${refs > 1 ? " shared" : ""}`, "text-anchor": "end", "dominant-baseline": "central" }, refs ? `×${refs}` : "free"));
    const letters = Math.floor((wide - 15) / LETTER);
    slots.forEach(({ code, id }, place) => {
      const line = y + BOX_HEAD + place * SLOT_TALL;
      nodes.push(draw("rect", { x: x + 4, y: line, width: wide - 8, height: SLOT_TALL - 2, rx: 2.5, class: `blocks-slot${code === DROPPED ? " dropped" : ""}` }));
      if (code === HELD) {
        const part = (wide - 8) / Math.max(1, owners.length);
        owners.forEach((owner, n) => nodes.push(draw("rect", { x: x + 4 + n * part, y: line, width: part, height: SLOT_TALL - 2, rx: 2.5, class: "blocks-held", style: { fill: scene.tint(owner) } })));
      }
      if (code && !context.bare) {
        const text = word(id);
        const shown = text.length > letters ? `${text.slice(0, letters - 1)}…` : text;
        nodes.push(draw("text", { x: x + 7, y: line + SLOT_TALL / 2 - 0.5, class: `blocks-word${code === LEFT ? " left" : ""}${code === DROPPED ? " dropped" : ""}`, "dominant-baseline": "central" }, shown));
      }
    });
    return draw("g", { "data-box": b, class: scene.aside(owners) ? "blocks-cell aside" : "blocks-cell" }, nodes);
  };

  /** Copy-on-write: an arrow from the block that others see to the copy that is written. */
  const copyOf = ({ from, to, owner }, scene) => {
    const [[x1, y1], [x2, y2]] = [scene.boxAt(from), scene.boxAt(to)];
    const lift = scene.tall + Math.max(y1, y2) + 16;
    const [a, b] = [x1 + scene.wide / 2, x2 + scene.wide / 2];
    const tip = y2 + scene.tall + 1;
    return draw(
      "g",
      {},
      draw("path", { d: `M${a} ${y1 + scene.tall} C${a} ${lift} ${b} ${lift} ${b} ${tip + 6}`, class: "blocks-copy", style: { stroke: scene.tint(owner) } }),
      draw("path", { d: `M${b} ${tip} l-6 9 h12 z`, style: { fill: scene.tint(owner) } }),
    );
  };

  const queueOf = ({ queueY, width }) => {
    const start = 112;
    const room = Math.max(1, Math.floor((width - start) / 30));
    const shown = now.free.slice(0, now.free.length > room ? room - 1 : room);
    const nodes = [draw("text", { x: 0, y: queueY + 11, class: "routes-head", "dominant-baseline": "central" }, now.free.length ? "free, next first" : "no block is free")];
    shown.forEach((b, n) => {
      nodes.push(draw("rect", { x: start + n * 30, y: queueY, width: 25, height: 21, rx: 5, class: "blocks-box free" }));
      nodes.push(draw("text", { x: start + n * 30 + 12.5, y: queueY + 11, class: "blocks-number", "text-anchor": "middle", "dominant-baseline": "central" }, String(b)));
    });
    if (shown.length < now.free.length) nodes.push(draw("text", { x: start + shown.length * 30, y: queueY + 11, class: "routes-label", "dominant-baseline": "central" }, `+${now.free.length - shown.length}`));
    return nodes;
  };

  const tell = (event) => {
    const box = event.target.closest?.("[data-box]");
    const text = event.target.closest?.("[data-text]");
    if (box) {
      const { b, refs, owners, slots } = now.boxes[Number(box.dataset.box)];
      const held = slots.filter(({ code }) => code === HELD).length;
      const names = owners.map((i) => now.texts[i].name).join(" and ");
      return [`block ${b}`, refs ? `${refs} ${refs === 1 ? "table points" : "tables point"} to it: ${names}` : "free", `${held} of ${slots.length} slots hold a token`, slots.filter(({ code }) => code).map(({ id }) => word(id)).join(" · ")];
    }
    if (text) {
      const one = now.texts[Number(text.dataset.text)];
      return [describe(one), textOf(one)];
    }
    return null;
  };

  const choose = (i, aloud) => {
    if (i === chosen) return;
    chosen = i;
    redraw();
    if (aloud && now && i >= 0) context.announce(`${describe(now.texts[i])}. ${textOf(now.texts[i])}`);
  };

  list.addEventListener("pointermove", (event) => {
    if (!now) return;
    const lines = tell(event);
    if (lines) context.tip.near(event, lines.filter(Boolean));
    else context.tip.hide();
    const text = event.target.closest?.("[data-text]");
    const box = event.target.closest?.("[data-box]");
    choose(text ? Number(text.dataset.text) : box && now.boxes[Number(box.dataset.box)].owners.length === 1 ? now.boxes[Number(box.dataset.box)].owners[0] : -1);
  });
  list.addEventListener("pointerleave", () => {
    context.tip.hide();
    choose(-1);
  });
  list.addEventListener("blur", () => choose(-1));
  const openAt = (i, j) => {
    if (spec.cell && i >= 0 && now.texts[i].entries.length) context.open({ sequence: i, entry: j });
  };
  list.addEventListener("click", (event) => {
    if (!now) return;
    const text = event.target.closest?.("[data-text]");
    const box = event.target.closest?.("[data-box]");
    if (text) openAt(Number(text.dataset.text), Number(event.target.dataset.entry || 0));
    else if (box) {
      const { b, owners } = now.boxes[Number(box.dataset.box)];
      if (owners.length) openAt(owners[0], now.texts[owners[0]].entries.indexOf(b));
    }
  });
  list.addEventListener("keydown", (event) => {
    if (!now) return;
    const moves = { ArrowDown: 1, ArrowUp: -1 };
    if (event.key in moves) choose(Math.max(0, Math.min(now.texts.length - 1, chosen + moves[event.key])), true);
    else if (event.key === "Enter" && chosen >= 0) openAt(chosen, 0);
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
    dispose() {
      said.remove();
      list.remove();
    },
    table: () => ({
      columns: ["text", "state", "its blocks", "words held"],
      rows: (now ? now.texts : []).map((text) => [text.name, STATE_WORDS[text.state] || "running", text.entries.map((b) => (b < 0 ? "–" : b)).join(" "), textOf(text)]),
    }),
  };
}

/** What happened between two steps, as sentences and as what to set off. */
function changes(before, now) {
  const change = { sentences: [], fresh: new Set(), taken: new Set(), freed: new Set(), copies: [] };
  if (!before) {
    const here = now.texts.filter(({ state }) => state === RUNNING).map(({ name }) => name);
    change.sentences.push(here.length ? `${inWords(here)} ${here.length === 1 ? "comes" : "come"} in.` : "");
    return change;
  }
  for (const { b, refs } of now.boxes) {
    if (refs && !before.boxes[b].refs) change.taken.add(b);
    if (!refs && before.boxes[b].refs) change.freed.add(b);
  }
  now.texts.forEach((text, i) => tellOf(text, before.texts[i], { before, now, change }));
  change.sentences = change.sentences.filter(Boolean);
  return change;
}

function tellOf(text, was, { before, now, change }) {
  const { i, name, state, entries } = text;
  const tell = (sentence) => change.sentences.push(sentence);
  if (state !== was.state) {
    const freed = was.entries.filter((b) => b >= 0 && change.freed.has(b));
    if (state === DONE) tell(`${name} is done${freed.length ? `: ${blockNames(freed)} ${freed.length === 1 ? "comes" : "come"} free` : ""}.`);
    if (state === AWAY) tell(`No block is left for ${name}: it is sent away and gives back all it had.`);
    if (state === WAITING) tell(`${name} has to wait: too few blocks are free.`);
    if (state !== RUNNING) return;
    const kin = now.texts.find((other) => other.i < i && other.entries.length && other.entries[0] === entries[0] && other.name[0] === name[0]);
    const shared = entries.filter((b) => b >= 0 && now.boxes[b].refs > 1).length;
    const share = `${shared} of its ${entries.length} blocks ${shared === 1 ? "is" : "are"} shared`;
    if (was.state === AWAY) tell(`${name} comes back.`);
    else if (kin) tell(`${kin.name} forks into ${name}: ${share}, nothing is copied.`);
    else tell(`${name} comes in${shared ? `: ${share}` : ` and takes ${blockNames(entries)}`}.`);
    entries.forEach((_, j) => change.fresh.add(`${i} ${j}`));
    return;
  }
  entries.forEach((b, j) => {
    const old = was.entries[j];
    if (b === old) return;
    change.fresh.add(`${i} ${j}`);
    if (old === undefined) tell(`${name} takes block ${b}.`);
    else if (b < 0) tell(`Block ${old} has lost its last word${change.freed.has(old) ? ": it comes free" : ""}.`);
    else {
      change.copies.push({ from: old, to: b, owner: i });
      tell(`${name} writes where others read: block ${old} is copied to ${b} first.`);
    }
  });
  const dropped = (frame, own) => own.filter((b) => b >= 0).flatMap((b) => frame.boxes[b].slots).filter(({ code }) => code === DROPPED).length;
  if (state === RUNNING && dropped(now, entries) > dropped(before, entries)) tell(`${name} drops a word: no block comes free.`);
}

function blockNames(numbers) {
  return `${numbers.length === 1 ? "block" : "blocks"} ${inWords(numbers)}`;
}

function inWords(items) {
  return items.length < 2 ? items.join("") : `${items.slice(0, -1).join(", ")} and ${items[items.length - 1]}`;
}
