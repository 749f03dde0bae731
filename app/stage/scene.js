/**
 * The stage: a scene's views on twelve columns. A new picture is built beside the old one and takes its place when its
 * first rows are here, so that turning a knob never blinks.
 */
import { bars } from "./bars.js";
import { bitRows } from "./bits.js";
import { blocks } from "./blocks.js";
import { calculator } from "./calculator.js";
import { curves } from "./curves.js";
import { make } from "./dom.js";
import { facing } from "./facing.js";
import { footprint } from "./footprint.js";
import { matrixAndLine } from "./grid.js";
import { heatmaps } from "./heatmaps.js";
import { ledger } from "./ledger.js";
import { numbers } from "./numbers.js";
import { createPanel } from "./panel.js";
import { plane } from "./plane.js";
import { ringOfDevices } from "./ring.js";
import { routes } from "./routes.js";
import { rulers } from "./rulers.js";
import { sayings } from "./sayings.js";
import { sheet } from "./sheet.js";
import { slots } from "./slots.js";
import { stack } from "./stack.js";
import { stretches } from "./stretches.js";
import { sweepTiles } from "./tiles.js";
import { timeline } from "./timeline.js";
import { tokens } from "./tokens.js";
import { guessTree } from "./tree.js";
import { towers } from "./towers.js";
import { Store } from "./track.js";
import { tries } from "./tries.js";

/** Every kind of view. A new one is a file with the same signature, and a line here. */
export const VIEWS = { heatmaps, slots, tokens, numbers, curves, bars, plane, routes, stack, calculator, blocks, stretches, footprint, facing, tiles: sweepTiles, ring: ringOfDevices, timeline, grid: matrixAndLine, bits: bitRows, rulers, sayings, towers, sheet, tree: guessTree, ledger, tries };

/** `base` is what all views share (see page.js); `hooks`: open(index, view, at) for a cell's arithmetic,
 * calculate(index, values, answered) for a calculator's. */
export function createScene(stage, base, hooks) {
  let current = null; // what is on the stage
  let next = null; // what waits for its first rows
  const tabled = new Set();

  const build = (message, store) => {
    const grid = make("div", { class: "stage-grid" });
    const panels = message.views.map((view, index) => {
      const panel = createPanel(view, index, { store, knobs: base.knobs });
      const context = Object.create(base, {
        store: { value: store },
        open: { value: (at) => hooks.open(index, view, at) },
        calculate: { value: hooks.calculate && ((values, answered) => hooks.calculate(index, values, answered)) },
      });
      const drawing = started(panel.host, view, context);
      panel.flip.addEventListener("click", () => flip(index));
      grid.append(panel.element);
      return { view, panel, drawing, version: "" };
    });
    return { grid, panels, store, key: keyOf(message), scene: message.scene };
  };

  const flip = (index) => {
    const name = `${current.scene} ${index}`;
    if (!tabled.delete(name)) tabled.add(name);
    base.player.redraw();
  };

  const mount = () => {
    const at = current ? focusedIndex(stage) : -1;
    if (current) current.panels.forEach(({ drawing }) => drawing && drawing.dispose());
    current = next;
    next = null;
    stage.replaceChildren(current.grid);
    stage.classList.remove("stale");
    if (at >= 0) current.panels[at]?.panel.host.querySelector("canvas[tabindex]")?.focus();
    light(lit);
  };

  let lit = "";
  const light = (name) => {
    lit = name;
    if (!current) return;
    for (const { view, panel } of current.panels) {
      const spot = Boolean(name) && view.name === name;
      panel.element.classList.toggle("spot", spot);
      if (spot) hooks.lit?.(panel.element);
    }
  };

  const drawPanel = (entry, index, step) => {
    const { panel, drawing, view } = entry;
    const asTable = tabled.has(`${current.scene} ${index}`);
    if (panel.tabled !== asTable) panel.show(asTable);
    if (!drawing) return false;
    const drawn = drawing.draw(step);
    if (asTable) panel.tabulate(drawing.table(step));
    const version = `${drawn} ${base.theme} ${JSON.stringify(base.knobs)} ${drawing.scale ? current.store.of(view.tensor)?.version : ""}`;
    if (version !== entry.version) {
      entry.version = version;
      panel.label(drawing.origin?.());
      if (drawing.scale) panel.legend(drawing.scale());
    }
    return drawn;
  };

  return {
    /** Take a `picture` message. Returns the store that its rows belong to; `kept` is one that has some already. */
    picture(message, kept) {
      const newest = next || current;
      const fresh = !newest || newest.store.run !== message.run;
      const store = fresh ? kept || new Store(message.run) : newest.store;
      store.model = message.model || {};
      store.values = message.knobs || null;
      store.total = message.steps || 0;
      store.describe(message.tracks);
      if (newest && newest.key === keyOf(message)) return store;
      next = build(message, store);
      stage.classList.add("stale");
      if (!current || (!fresh && store.steps > 0)) mount();
      return store;
    },
    /** Rows have arrived: a picture that waited for them goes up. */
    arrived() {
      if (next && next.store.steps > 0) mount();
      return current ? current.store : null;
    },
    /** Draw every view at `step`; true when real data was drawn. */
    draw(step) {
      if (!current) return false;
      return current.panels.map((entry, index) => drawPanel(entry, index, step)).some(Boolean);
    },
    resize() {
      if (current) current.panels.forEach(({ drawing }) => drawing && drawing.resize());
    },
    light,
    /** t: turn the panel that has the focus (or the first, or the one in the spotlight) into its table and back. */
    flip() {
      if (!current || !current.panels.length) return;
      const spotted = current.panels.findIndex(({ view }) => lit && view.name === lit);
      const focused = focusedIndex(stage);
      flip(focused >= 0 ? focused : Math.max(0, spotted));
    },
    get store() {
      return current ? current.store : null;
    },
    /** What is on the stage, and which scene it is. */
    get element() {
      return current ? current.grid : stage;
    },
    get scene() {
      return current ? current.scene : "";
    },
    /** Whether all that the run has for this scene is here. */
    get whole() {
      return Boolean(current && current.store.steps > 0 && current.store.steps >= current.store.total);
    },
    get pending() {
      return next ? next.store : current ? current.store : null;
    },
  };
}

/** The view at work, or null: one that fails says so in its panel and leaves the others alone. */
function started(host, view, context) {
  try {
    return VIEWS[view.kind](host, view, context);
  } catch (error) {
    reportError(error);
    host.replaceChildren(`This picture (${view.kind}) could not be drawn.`);
    return null;
  }
}

function keyOf(message) {
  return `${message.run} ${message.scene} ${JSON.stringify(message.views)}`;
}

/** Which panel holds the keyboard's focus, or -1. */
function focusedIndex(stage) {
  const active = stage.getRootNode().activeElement;
  const panel = active && stage.contains(active) ? active.closest("[data-index]") : null;
  return panel ? Number(panel.dataset.index) : -1;
}
