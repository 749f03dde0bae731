/**
 * A matrix to edit: one input a cell, a message at the cell that holds no number, and a whole block at once from a
 * spreadsheet's clipboard. The server reads it again by the same rules (lessons/cells.py).
 */
import { fill, make, say } from "./dom.js";

const HASTE = 700; // milliseconds in which someone who types may finish a number

/** The rows of a pasted or stored matrix, as text: columns by tabs, else semicolons, else commas, else blanks. */
function rowsOf(text) {
  const lines = text.replace(/^[ \r\n]+|[ \r\n]+$/g, "").split(/\r\n|\r|\n/);
  const between = ["\t", ";", ","].find((sign) => lines.some((line) => line.includes(sign)));
  const rows = lines.map((line) => (between ? line.split(between) : line.trim().split(/\s+/)).map((cell) => cell.trim()));
  const wide = Math.max(...rows.map((row) => row.length));
  return rows.map((row) => Array.from({ length: wide }, (_, j) => row[j] ?? ""));
}

/** What is wrong with a cell, in one sentence, or "". */
function faultOf(cell, most) {
  const plain = cell.trim().replace("−", "-");
  if (!plain) return "is empty; a number is expected.";
  if (/^[+-]?inf(inity)?$/i.test(plain)) return "is infinite; only finite numbers have a place on a grid.";
  if (!/^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(plain)) return `holds “${cell.trim().slice(0, 20)}”, which is no number (2.5 is one).`;
  return Math.abs(Number(plain)) > most ? `is larger than ${most.toExponential()}, the most that a cell holds.` : "";
}

export function matrixKnob(spec, set, value) {
  const table = make("div", { class: "cells", role: "group", id: `knob-${spec.name}`, tabindex: -1, "aria-label": spec.label });
  const fault = make("div", { class: "field-error", role: "alert", hidden: true });
  let rows = [];
  let inputs = [];
  let given = "";
  let waiting = 0;

  const tell = (text) => {
    say(fault, text);
    fault.hidden = !text;
  };

  /** Mark what is no number; returns whether all is well. */
  const judge = () => {
    let first = "";
    rows.forEach((row, i) => row.forEach((cell, j) => {
      const wrong = faultOf(cell, spec.most);
      inputs[i][j].setAttribute("aria-invalid", String(Boolean(wrong)));
      if (wrong && !first) first = `Row ${i + 1}, column ${j + 1} ${wrong}`;
    }));
    tell(first);
    return !first;
  };

  const sound = () => rows.every((row) => row.every((cell) => !faultOf(cell, spec.most)));

  const commit = () => {
    clearTimeout(waiting);
    if (!judge()) return;
    const text = rows.map((row) => row.map((cell) => String(Number(Number(cell.trim().replace("−", "-")).toPrecision(9)))).join(" ")).join("\n");
    if (text === given) return;
    given = text;
    set(text);
  };

  const typed = (i, j) => {
    rows[i][j] = inputs[i][j].value;
    clearTimeout(waiting);
    if (sound()) commit();
    else waiting = setTimeout(judge, HASTE);
  };

  /** Cells above and below by the arrow keys; left and right belong to the text in the cell. */
  const step = (event, i, j) => {
    const to = { ArrowUp: i - 1, ArrowDown: i + 1, Enter: i + 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    commit();
    inputs[to]?.[j]?.focus();
    inputs[to]?.[j]?.select();
  };

  const pasted = (event) => {
    const text = event.clipboardData?.getData("text") || "";
    if (!/[\t;,\n]|\S\s+\S/.test(text.trim())) return; // one number goes into its cell
    event.preventDefault();
    const block = rowsOf(text);
    if (block.length > spec.rows || block[0].length > spec.columns) {
      tell(`What was pasted has ${block.length} rows and ${block[0].length} columns; at most ${spec.rows} by ${spec.columns} fit.`);
      return;
    }
    lay(block);
    commit();
  };

  const lay = (block) => {
    rows = block;
    inputs = rows.map((row, i) =>
      row.map((cell, j) => {
        const input = make("input", { type: "text", inputmode: "decimal", class: "cell-input", autocomplete: "off", spellcheck: "false", "aria-label": `${spec.label}, row ${i + 1}, column ${j + 1}` });
        input.value = cell;
        input.addEventListener("input", () => typed(i, j));
        input.addEventListener("blur", () => rows[i]?.[j] === input.value && faultOf(input.value, spec.most) && judge());
        input.addEventListener("focus", () => input.select());
        input.addEventListener("keydown", (event) => step(event, i, j));
        input.addEventListener("paste", pasted);
        return input;
      }),
    );
    table.style.setProperty("--cells", rows[0].length);
    fill(table, inputs.flat());
    for (const [button, works] of buttons) button.disabled = !works();
  };

  const resize = (down, right) => {
    const wide = rows[0].length + right;
    const tall = rows.length + down;
    lay(Array.from({ length: tall }, (_, i) => Array.from({ length: wide }, (_, j) => rows[i]?.[j] ?? "0")));
    commit();
  };

  const button = (label, title, work, works) => [make("button", { type: "button", class: "cells-button", "aria-label": title, title, on: { click: work } }, label), works];
  const buttons = [
    button("+ row", "Add a row", () => resize(1, 0), () => rows.length < spec.rows),
    button("− row", "Take the last row away", () => resize(-1, 0), () => rows.length > 1),
    button("+ column", "Add a column", () => resize(0, 1), () => rows[0].length < spec.columns),
    button("− column", "Take the last column away", () => resize(0, -1), () => rows[0].length > 1),
    button("Reset", "Put back the matrix that it began with", () => {
      lay(rowsOf(spec.default));
      commit();
    }, () => true),
  ];

  const show = (now) => {
    if (now === given) return;
    given = now;
    lay(rowsOf(now));
    judge();
  };
  show(value);
  const head = make("div", { class: "knob-head" }, make("span", { class: "knob-name" }, spec.label), make("span", { class: "counter" }, "type or paste"));
  const node = make("div", { class: "knob knob-cells" }, head, make("div", { class: "cells-frame" }, table), fault, make("div", { class: "cells-foot" }, buttons.map(([b]) => b)));
  return {
    node,
    input: table,
    show,
    /** Bring the cell under the caret: a view was asked to edit it. */
    edit(i, j) {
      const input = inputs[i]?.[j];
      input?.scrollIntoView({ block: "nearest" });
      input?.focus();
    },
  };
}
