/**
 * Making elements. The only way that this page makes them: text becomes text nodes, never markup, so that
 * a prompt, a token or a link cannot bring HTML with it.
 */
import { ratio } from "./glass.js";

const SVG = "http://www.w3.org/2000/svg";

/**
 * Make an element. `properties`: `class`, `on` {event: handler}, `style` {name: value}, anything else an attribute
 * (true sets it empty, false and null leave it out). Children are elements or text.
 */
export function make(tag, properties = {}, ...children) {
  return furnish(document.createElement(tag), properties, children);
}

/** The same for SVG. */
export function draw(tag, properties = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), properties, children);
}

function furnish(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else if (name === "style") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Put `children` in place of what `element` holds. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
}

/** Set text only when it differs: a live region must not speak twice, and layout must not be disturbed. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A canvas sized to device pixels for `width` by `height` CSS pixels; returns its context, scaled. */
export function sized(canvas, width, height) {
  const scale = ratio();
  const w = Math.max(1, Math.round(width * scale));
  const h = Math.max(1, Math.round(height * scale));
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
  }
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  return pen;
}

/** Call `work` at most once every `wait` milliseconds: at once, then with the newest arguments. */
export function throttled(work, wait) {
  let last = -Infinity;
  let timer = 0;
  return (...args) => {
    clearTimeout(timer);
    const left = last + wait - performance.now();
    const go = () => {
      last = performance.now();
      work(...args);
    };
    if (left <= 0) go();
    else timer = setTimeout(go, left);
  };
}
