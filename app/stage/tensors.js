/** The Tensors tab: everything this run recorded, its values on demand, and the whole of it for download. */
import { fill, make } from "./dom.js";
import { plain } from "./track.js";
import { bytes, short } from "./text.js";

/** `explore`: the address of the page that looks at any of them, "" where there is none. */
export function createTensors(send, player, explore = "") {
  const rows = make("tbody", {});
  const names = ["Tensor", "Shape", "Type", "Size", "Low", "High", "Mean"];
  const list = make("table", { class: "tensor-list" }, make("thead", {}, make("tr", {}, names.map((name) => make("th", { scope: "col" }, name)))), rows);
  const cut = make("p", { class: "cut-note", hidden: true });
  const grid = make("div", { class: "value-grid", tabindex: 0, role: "region", "aria-label": "Values" });
  const offer = (what, label) => make("button", { type: "button", class: "download", on: { click: () => send({ type: "download", what }) } }, label);
  const downloads = make("div", { class: "downloads" }, offer("npz", "All tensors (.npz)"), offer("recording", "The recording (.safetensors)"), offer("claims", "The claims (.csv)"), explore ? exploring(explore) : null);
  const waiting = make("p", { class: "waiting-text" }, "Listing the tensors …");
  const element = make("div", { class: "tensor-page" }, downloads, waiting, make("div", { class: "table-scroll", tabindex: 0, role: "region", "aria-label": "Recorded tensors" }, list), cut);
  list.hidden = true;

  const places = new Map(); // key -> its row in the list

  const show = (message) => {
    places.clear();
    list.hidden = false;
    waiting.hidden = true;
    fill(
      rows,
      message.tensors.map((t) => {
        const row = make(
          "tr",
          {},
          make("td", {}, make("button", { type: "button", class: "tensor-open", on: { click: () => send({ type: "tensor", key: t.key, step: player.step }) } }, t.key), make("div", { class: "small" }, [t.symbol, t.meaning].filter(Boolean).join(" · "))),
          make("td", { class: "figures" }, shapeOf(t)),
          make("td", { class: "figures" }, t.dtype),
          make("td", { class: "figures" }, bytes(t.bytes)),
          ...[t.low, t.high, t.mean].map((v) => make("td", { class: "figures" }, typeof v === "number" ? short(v) : "—")),
        );
        places.set(t.key, row);
        return row;
      }),
    );
    cut.hidden = !message.cut.length;
    cut.textContent = `Left out to keep the recording small: ${message.cut.map((c) => `${c.key} (${bytes(c.bytes)})`).join(", ")}.`;
  };

  /** The last axis runs to the right, all others downwards. */
  const values = (message) => {
    const data = plain(message.data);
    const width = message.shape.length ? message.shape[message.shape.length - 1] : 1;
    const lines = [];
    for (let i = 0; i < data.length; i += Math.max(1, width)) lines.push(data.subarray(i, i + width));
    const body = lines.map((line, i) => make("tr", {}, make("th", { scope: "row" }, String(i)), [...line].map((v) => make("td", {}, short(v)))));
    const head = make("tr", {}, make("th", {}, ""), Array.from({ length: width }, (_, i) => make("th", { scope: "col" }, String(i))));
    fill(grid, make("h4", {}, `${message.key} [${message.shape.join(" × ")}]${message.more ? ", the first values" : ""}`), make("table", {}, make("thead", {}, head), make("tbody", {}, body)));
    const before = grid.closest("tr");
    const after = make("tr", {}, make("td", { colspan: names.length }, grid));
    before?.remove();
    places.get(message.key)?.after(after);
    after.scrollIntoView({ block: "nearest" });
  };

  return { element, show, values };
}

/** A link to the explorer of this very run: with the page's own state in it. */
function exploring(address) {
  const link = make("a", { class: "download", href: address }, "Explore them: slices, lines, distributions →");
  const follow = () => {
    const state = new URLSearchParams(location.search).get("s");
    link.setAttribute("href", state ? `${address}?s=${encodeURIComponent(state)}` : address);
  };
  for (const kind of ["focus", "pointerenter", "pointerdown"]) link.addEventListener(kind, follow);
  return link;
}

function shapeOf({ axes, shape }) {
  return shape.map((n, i) => (axes[i] ? `${axes[i]} ${n}` : String(n))).join(" · ") || "scalar";
}

/** Offer bytes that the server sent for saving. */
export function save({ name, mime, data }) {
  const url = URL.createObjectURL(new Blob([plain(data)], { type: mime }));
  const link = make("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
