/**
 * The page through a magnifying glass: on a projector all of it is enlarged, pictures too. Views measure and draw in
 * their own pixels and ask here how many of the screen's there are to one, and where a pointer is.
 */

let enlarged = 1; // the page, on a projector
let finer = 1; // canvases, while a picture of them is taken

/** Device pixels to one of a view's. */
export function ratio() {
  return (window.devicePixelRatio || 1) * enlarged * finer;
}

/** How much larger the page is shown than it says. */
export function enlargement() {
  return enlarged;
}

/** Enlarge the whole page; a browser that cannot leaves it as it is. */
export function magnify(root, by) {
  enlarged = CSS.supports("zoom", "2") ? by : 1;
  root.style.zoom = enlarged === 1 ? "" : String(enlarged);
  root.style.setProperty("--zoom", String(enlarged));
}

/** Until told 0, canvases have so many pixels to one of a view's, whatever the screen has. */
export function finely(by) {
  finer = by ? by / ((window.devicePixelRatio || 1) * enlarged) : 1;
}

/** Where a pointer is in an element, in the element's own pixels. */
export function within(event, element) {
  const rect = element.getBoundingClientRect();
  return { x: (event.clientX - rect.left) / enlarged, y: (event.clientY - rect.top) / enlarged };
}
