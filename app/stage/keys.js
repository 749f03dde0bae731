/** The keyboard. Nothing is taken from someone who types, and a control that has the focus keeps its own keys. */

const TYPING = new Set(["text", "search", "number", "email", "url", "password"]);

/** Which keys the focused element needs for itself. */
function owns(target, key) {
  if (!target || target.nodeType !== 1) return false;
  const tag = target.tagName;
  if (tag === "TEXTAREA" || target.isContentEditable || (tag === "INPUT" && TYPING.has(target.type))) return true;
  if (tag === "SELECT") return key !== "Escape";
  if (tag === "INPUT" && target.type === "range") return /^(Arrow|Home|End|Page)/.test(key);
  if (tag === "INPUT") return key === " ";
  if (tag === "BUTTON" || tag === "SUMMARY") return key === " " || key === "Enter";
  return tag === "A" && key === "Enter";
}

/**
 * `actions` maps a key to what it does; one that returns false leaves the key to the browser. Of `firm` keys a control
 * keeps none, unless someone types. Returns a function that stops listening.
 */
export function listenKeys(actions, where = document, firm = () => false) {
  const press = (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    const action = actions[event.key];
    const path = event.composedPath();
    if (path.some((node) => node.nodeName === "DIALOG")) return;
    const target = path[0];
    if (!action || (owns(target, event.key) && !(firm(event.key) && target.type === "range"))) return;
    if (where !== document) event.stopPropagation(); // a notebook has keys of its own
    if (action() !== false) event.preventDefault();
  };
  where.addEventListener("keydown", press);
  return () => where.removeEventListener("keydown", press);
}
