/** The three tabs under the stage: Claims, Code, Tensors. The last two ask for their content when first opened. */
import { createCode } from "./code.js";
import { fill, make, say } from "./dom.js";
import { createTensors } from "./tensors.js";

export function createTabs(send, player, footnote = "", explore = "") {
  const claims = createClaims(footnote);
  const code = createCode();
  const tensors = createTensors(send, player, explore);
  const pages = [
    { name: "Claims", element: claims.element },
    { name: "Code", element: code.element, ask: "code" },
    { name: "Tensors", element: tensors.element, ask: "tensors" },
  ];
  const count = make("sup", {});
  const buttons = pages.map(({ name }, i) =>
    make("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `page-${name}`, on: { click: () => show(i), keydown: (event) => arrow(event, i) } }, name, i === 0 ? count : null),
  );
  pages.forEach(({ name, element }) => {
    element.id = `page-${name}`;
    element.setAttribute("role", "tabpanel");
    element.setAttribute("aria-labelledby", `tab-${name}`);
    element.setAttribute("tabindex", "0");
  });
  const asked = new Set();

  const show = (index) => {
    pages.forEach(({ element }, i) => {
      element.hidden = i !== index;
      buttons[i].setAttribute("aria-selected", String(i === index));
      buttons[i].setAttribute("tabindex", i === index ? 0 : -1);
    });
    const { ask } = pages[index];
    if (ask && !asked.has(ask)) {
      asked.add(ask);
      send({ type: ask });
    }
  };

  const arrow = (event, i) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: pages.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const index = (to + pages.length) % pages.length;
    show(index);
    buttons[index].focus();
  };

  show(0);
  return {
    element: make("section", { class: "tabs", "aria-label": "Claims, code and tensors" }, make("div", { role: "tablist", class: "tab-list" }, buttons), pages.map((page) => page.element)),
    claims(list) {
      say(count, list.length ? String(list.length) : "");
      claims.show(list);
    },
    code: code.show,
    tensors: tensors.show,
    tensor: tensors.values,
    /** Another run: what Tensors shows is out of date. */
    renew() {
      if (!asked.delete("tensors")) return;
      if (!pages[2].element.hidden) show(2);
    },
  };
}

const VERDICTS = { agrees: ["✓", "agrees"], differs: ["≠", "differs"], untestable: ["–", "not testable here"] };

/** What the source says beside what this run measured. A table on wide screens, cards on a phone (by CSS). */
function createClaims(footnote) {
  const names = ["What the source says", "Formula, this run", "Reported", "Measured here", "Verdict"];
  const rows = make("tbody", {});
  const table = make("table", { class: "claims" }, make("thead", {}, make("tr", {}, names.map((name) => make("th", { scope: "col" }, name)))), rows);
  const waiting = make("p", { class: "waiting-text" }, "The claims are checked when the run is done.");
  const whose = make("p", { class: "claims-footnote" }, footnote);
  const element = make("div", {}, table, waiting, whose);
  table.hidden = true;
  whose.hidden = true;

  const show = (claims) => {
    table.hidden = !claims.length;
    waiting.hidden = claims.length > 0;
    whose.hidden = !footnote || !claims.length;
    fill(
      rows,
      claims.map((claim) => {
        const [sign, word] = VERDICTS[claim.verdict] || ["", claim.verdict];
        const cell = (i, ...content) => make("td", { "data-label": names[i], class: i ? "figures" : null }, ...content);
        return make(
          "tr",
          {},
          make("td", { "data-label": names[0] }, make("span", { class: "claim-text" }, claim.text), make("span", { class: "claim-source" }, claim.source), claim.why ? make("div", { class: "claim-why" }, claim.why) : null),
          cell(1, claim.formula || "—"),
          cell(2, claim.reported || "—"),
          cell(3, claim.measured || "—", claim.unit ? make("span", { class: "unit" }, ` ${claim.unit}`) : null),
          make("td", { "data-label": names[4] }, make("span", { class: `verdict-pill ${claim.verdict}` }, make("span", { "aria-hidden": "true" }, `${sign} `), word)),
        );
      }),
    );
  };
  return { element, show };
}
