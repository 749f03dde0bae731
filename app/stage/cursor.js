/**
 * Pointing at cells of a canvas: with the mouse, a finger, or the arrow keys. The outlined cell is an element over the
 * canvas, so that moving it draws nothing again.
 *
 * `grid` answers for the view: find(x, y) -> cell or null; box(cell) -> {x, y, width, height} or null;
 * move(cell or null, rows, columns) -> cell; lines(cell) -> what the read-out says; open(cell) on click and Enter.
 */
import { make } from "./dom.js";
import { enlargement, within } from "./glass.js";

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

export function createCursor(host, canvas, tip, grid, announce) {
  const outline = make("div", { class: "cell-cursor", hidden: true });
  host.append(outline);
  let cell = null;
  let pointer = null; // where the mouse rests, so that what is read out stays true while the picture moves

  const mark = () => {
    const box = some() && grid.box(cell);
    outline.hidden = !box;
    if (!box) return;
    Object.assign(outline.style, {
      transform: `translate(${box.x}px, ${box.y}px)`,
      width: `${box.width}px`,
      height: `${box.height}px`,
    });
  };

  const some = () => cell !== null && cell !== undefined; // a chart's first point is number 0

  const at = (event) => {
    const { x, y } = within(event, canvas);
    return grid.find(x, y);
  };

  const hover = (event) => {
    pointer = { clientX: event.clientX, clientY: event.clientY };
    cell = at(event);
    mark();
    canvas.style.cursor = some() ? "pointer" : "";
    if (some()) tip.near(pointer, grid.lines(cell));
    else tip.hide();
  };

  const refresh = () => {
    mark();
    if (pointer && some() && grid.box(cell)) tip.near(pointer, grid.lines(cell));
  };

  const leave = () => {
    pointer = null;
    tip.hide();
    if (document.activeElement !== canvas && host.getRootNode().activeElement !== canvas) {
      cell = null;
      mark();
    }
  };

  const speak = () => {
    const box = grid.box(cell);
    if (!box) return;
    const lines = grid.lines(cell);
    announce(lines.join(", "));
    const rect = canvas.getBoundingClientRect();
    const by = enlargement();
    tip.near({ clientX: rect.left + (box.x + box.width) * by, clientY: rect.top + (box.y + box.height) * by }, lines);
  };

  const press = (event) => {
    if (event.key in ARROWS && !event.altKey && !event.ctrlKey && !event.metaKey) {
      cell = grid.move(cell, ...ARROWS[event.key]);
      mark();
      if (some()) speak();
    } else if (event.key === "Enter" && some()) {
      grid.open(cell);
    } else if (event.key === "Escape") {
      cell = null;
      mark();
      tip.hide();
      return; // others may have something to close, too
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  };

  canvas.addEventListener("pointermove", hover);
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("keydown", press);
  canvas.addEventListener("click", (event) => {
    cell = at(event);
    mark();
    if (some()) grid.open(cell);
  });

  return {
    /** The picture under the cursor changed: keep the outline on its cell, and the read-out true. */
    refresh,
  };
}
