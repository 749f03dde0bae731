/**
 * A stack of techniques as a ledger: each row stands on those above, each figure has a bar against the first row's, and
 * one figure has a budget: how much of what it may rise by each row has eaten, as a staircase down the rows.
 */
import { make, say } from "./dom.js";
import { format } from "./text.js";

const WIDEST = 1.6; // times the allowed rise that the staircase has room for
const SLIGHT = 0.0005; // a change of a figure that is none

export function ledger(host, spec, context) {
  const { store } = context;
  const budgeted = spec.columns[spec.budgeted];
  const cellOf = (column) => {
    const value = make("span", { class: "ledger-value" });
    const bar = make("span", { class: "ledger-bar" });
    return { column, value, bar, node: make("div", { class: "ledger-cell", role: "cell" }, make("span", { class: "ledger-name small", "aria-hidden": "true" }, column.label), value, make("span", { class: "ledger-room" }, bar)) };
  };
  const stairs = () => {
    const now = make("span", { class: "ledger-eaten" });
    const stair = make("span", { class: "ledger-stair" });
    const limit = make("span", { class: "ledger-limit" });
    return { now, stair, limit, node: make("div", { class: "ledger-cell ledger-budget", role: "cell" }, make("span", { class: "ledger-name small", "aria-hidden": "true" }, "of what is allowed"), now, make("span", { class: "ledger-room" }, stair, limit)) };
  };
  const rows = spec.entries.map((entry, n) => {
    const detail = make("span", { class: "small" });
    const cells = spec.columns.map(cellOf);
    const budget = stairs();
    const mark = make("span", { class: "ledger-mark", "aria-hidden": "true" });
    const node = make("div", { class: "ledger-row", role: "row" }, make("div", { class: "ledger-entry", role: "rowheader" }, mark, make("span", { class: "ledger-label" }, entry.label), detail), cells.map((cell) => cell.node), budget.node);
    cells.forEach((cell, c) => {
      cell.node.addEventListener("click", () => choose(n, c) && openChosen());
      cell.node.addEventListener("pointermove", (event) => context.tip.near(event, linesOf(n, c)));
      cell.node.addEventListener("pointerleave", () => context.tip.hide());
    });
    budget.node.addEventListener("pointermove", (event) => context.tip.near(event, budgetLines(n)));
    budget.node.addEventListener("pointerleave", () => context.tip.hide());
    return { entry, n, detail, cells, budget, node, mark };
  });
  const heads = spec.columns.map((column) => make("div", { class: "ledger-head", role: "columnheader" }, column.label, column.origin ? make("span", { class: `origin origin-${column.origin}` }, column.origin) : null));
  const allowedHead = make("div", { class: "ledger-head", role: "columnheader" });
  const totals = spec.columns.map((column) => make("div", { class: "ledger-total", role: "cell", "data-label": column.label }));
  const left = make("div", { class: "ledger-total", role: "cell", "data-label": "error budget" });
  const foot = make("div", { class: "ledger-row ledger-foot", role: "row" }, make("div", { class: "ledger-entry", role: "rowheader" }, make("span", { class: "ledger-label" }, "All in all")), totals, left);
  const list = make("div", { class: "ledger", role: "table", "aria-label": spec.title, style: { "--columns": spec.columns.length } },
    make("div", { class: "ledger-row ledger-heads", role: "row" }, make("div", { class: "ledger-head", role: "columnheader" }, "step"), heads, allowedHead), rows.map(({ node }) => node), foot);
  const focus = make("div", { class: `ledger-focus ${spec.cell ? "ledger-opens" : ""}`, tabindex: context.bare ? null : 0, role: "group", "aria-label": `${spec.title}. Arrow keys read the figures${spec.cell ? ", Enter opens one" : ""}.` }, list);
  host.append(focus);
  let chosen = null; // [row, column]
  let step = 0;
  let frame = [];
  let used = [];

  const allowed = () => Number(spec.allowed?.knob ? context.knobs[spec.allowed.knob] : spec.allowed) / 100;
  const known = (n, c) => n >= 0 && Boolean(used[n]) && Number.isFinite(frame[n]?.[c]);
  const firstOf = (c) => (known(0, c) ? frame[0][c] : null);
  /** The nearest row above that has a figure. */
  const before = (n, c) => {
    for (let i = n - 1; i >= 0; i -= 1) if (known(i, c)) return frame[i][c];
    return firstOf(c);
  };
  const last = (c) => {
    for (let i = rows.length - 1; i > 0; i -= 1) if (known(i, c)) return i;
    return 0;
  };
  const rise = (value) => value / firstOf(spec.budgeted) - 1;
  const shown = (value, column) => `${format(value, column.format)}${column.unit}`;
  const times = (from, to, more) => {
    const by = more ? to / from : from / to;
    if (!Number.isFinite(by) || by <= 0) return "";
    if (Math.abs(by - 1) < SLIGHT) return "as it was";
    return more ? `×${format(by, ".3g")}` : by > 1 ? `÷${format(by, by < 10 ? ".3g" : ".0f")}` : `×${format(1 / by, ".3g")}`;
  };

  const linesOf = (n, c) => {
    if (!known(n, c)) return [spec.columns[c].label, used[n] ? "not measured" : "not in this stack"];
    const column = spec.columns[c];
    const value = frame[n][c];
    return [`${column.label} ${shown(value, column)}`, ...(n ? [`${times(firstOf(c), value, column.more)} against ${spec.entries[0].label.toLowerCase()}`, `${times(before(n, c), value, column.more)} against the step before`] : []), ...(column.origin ? [column.origin] : [])];
  };

  const choose = (n, c) => {
    if (chosen) rows[chosen[0]].cells[chosen[1]].node.classList.remove("chosen");
    chosen = known(n, c) ? [n, c] : null;
    if (chosen) rows[n].cells[c].node.classList.add("chosen");
    return Boolean(chosen);
  };
  const openChosen = () => spec.cell && chosen && context.open({ row: chosen[0], column: chosen[1] });

  const MOVES_OF_KEYS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  focus.addEventListener("keydown", (event) => {
    const move = MOVES_OF_KEYS[event.key];
    if (event.key === "Enter" && chosen) openChosen();
    else if (event.key === "Escape" && chosen) return void choose(-1, 0);
    else if (move && !event.altKey && !event.ctrlKey && !event.metaKey) {
      const there = rows.map(({ n }) => n).filter((n) => used[n] && known(n, 0));
      if (!there.length) return;
      const row = chosen ? Math.max(0, Math.min(there.length - 1, there.indexOf(chosen[0]) + move[0])) : 0;
      const column = chosen ? Math.max(0, Math.min(spec.columns.length - 1, chosen[1] + move[1])) : 0;
      if (choose(there[row], column)) context.announce([rows[there[row]].entry.label, ...linesOf(there[row], column)].join(", "));
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });

  const budgetLines = (n) => {
    if (!known(n, spec.budgeted)) return ["error budget", used[n] ? "not measured" : "not in this stack"];
    const total = rise(frame[n][spec.budgeted]);
    const own = total - rise(before(n, spec.budgeted));
    return [`${budgeted.label} ${format(total, "+.1%")} so far`, `this step ${format(own, "+.1%")}`, `${format(total / allowed(), ".0%")} of the ${format(allowed(), ".0%")} allowed`];
  };

  const paintBudget = (row) => {
    const { now, stair, limit, node } = row.budget;
    const there = row.n > 0 && known(row.n, spec.budgeted);
    node.classList.toggle("over", there && rise(frame[row.n][spec.budgeted]) > allowed());
    stair.hidden = !there;
    limit.style.left = `${100 / WIDEST}%`;
    if (!there) return say(now, row.n || !used[0] ? "" : "0%");
    const most = allowed() * WIDEST;
    const place = (value) => Math.max(0, Math.min(1, value / most)) * 100;
    const to = rise(frame[row.n][spec.budgeted]);
    const [from, end] = [place(rise(before(row.n, spec.budgeted))), place(to)];
    stair.style.left = `${Math.min(from, end)}%`;
    stair.style.width = `max(3px, ${Math.abs(end - from)}%)`;
    node.classList.toggle("back", end < from);
    node.classList.toggle("beyond", to > most);
    return say(now, `${to > allowed() ? "▲ " : ""}${format(to / allowed(), to / allowed() < 10 ? ".0%" : ",.0%")}`);
  };

  const paint = (row) => {
    const here = Boolean(used[row.n]);
    const values = store.values || context.knobs;
    row.node.classList.toggle("out", used.length > 0 && !here);
    row.node.classList.toggle("coming", !used.length || (here && !row.cells.some((_, c) => known(row.n, c))));
    say(row.detail, here ? row.entry.detail.replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? "")) : used.length ? "not in this stack" : "");
    row.cells.forEach((cell, c) => {
      const there = known(row.n, c);
      say(cell.value, there ? shown(frame[row.n][c], cell.column) : here && Number.isFinite(frame[0]?.[c]) && !row.cells.some((_, i) => known(row.n, i)) ? "…" : "–");
      const most = Math.max(...rows.filter(({ n }) => known(n, c)).map(({ n }) => frame[n][c]), 1e-12);
      const ground = cell.column.more || firstOf(c) === null ? most : Math.max(firstOf(c), Math.min(most, 3 * firstOf(c)));
      cell.bar.style.transform = `scaleX(${there ? Math.max(0.004, Math.min(1, frame[row.n][c] / ground)) : 0})`;
      cell.node.classList.toggle("changed", there && row.n > 0 && Math.abs(frame[row.n][c] / before(row.n, c) - 1) > 0.004);
    });
    paintBudget(row);
  };

  return {
    draw(now) {
      step = now;
      frame = store.frame(spec.tensor, step) || [];
      used = store.newest(spec.used, step) || [];
      rows.forEach(paint);
      say(allowedHead, `of ${format(allowed(), ".0%")} allowed`);
      spec.columns.forEach((column, c) => say(totals[c], last(c) ? times(firstOf(c), frame[last(c)][c], column.more) : "…"));
      const end = last(spec.budgeted);
      const over = end ? rise(frame[end][spec.budgeted]) / allowed() - 1 : NaN;
      foot.classList.toggle("over", over > 0);
      say(left, end ? (over > 0 ? `▲ over by ${format(over, ",.0%")}` : `${format(-over, ".0%")} left`) : "…");
      return frame.length > 0;
    },
    resize() {},
    dispose() {
      focus.remove();
    },
    table: () => ({
      columns: ["step", ...spec.columns.map(({ label, unit, origin }) => [label, unit, origin].filter(Boolean).join(", ")), `of ${format(allowed(), ".0%")} allowed`],
      rows: rows.map((row) => [row.entry.label, ...row.cells.map((cell, c) => (known(row.n, c) ? format(frame[row.n][c], ".4g") : "–")), known(row.n, spec.budgeted) ? format(rise(frame[row.n][spec.budgeted]) / allowed(), ".0%") : "–"]),
    }),
  };
}
