/**
 * Part of the page as an SVG that any program can open: boxes, text and lines as such, canvases as pictures, nothing
 * of HTML left. Everything is read off the page as it stands, so that no view has to know how to do this.
 */
import { draw } from "./dom.js";
import { enlargement } from "./glass.js";

const LEFT_OUT = ".flip, .cell-cursor, .visually-hidden, .tip"; // for the hand, not for paper
const STYLED = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linecap", "stroke-linejoin", "opacity", "font-family", "font-size", "font-weight", "font-style", "letter-spacing", "text-anchor", "dominant-baseline", "visibility", "transform", "transform-origin"];
const EDGE = 16;
const CAPTION = 30; // pixels for the line under the picture

/** `element` as an SVG element. `caption`: [left, right] under it; `ground`: the colour behind it; `fonts`: CSS. */
export function svgOf(element, { caption, ground, ink, fonts }) {
  const box = element.getBoundingClientRect();
  const by = enlargement();
  const width = Math.ceil(box.width / by) + 2 * EDGE;
  const height = Math.ceil(box.height / by) + 2 * EDGE + CAPTION;
  const pen = { x: box.left / by - EDGE, y: box.top / by - EDGE, by, defs: draw("defs"), names: 0, measure: measurer() };
  const style = draw("style");
  style.textContent = `${fonts}text{white-space:pre;font-variant-numeric:tabular-nums}`;
  pen.defs.append(style);
  const line = { y: height - EDGE / 2 - 3, "font-family": "Inter, system-ui, sans-serif", "font-size": 12, fill: ink };
  return draw(
    "svg",
    { xmlns: "http://www.w3.org/2000/svg", width, height, viewBox: `0 0 ${width} ${height}` },
    pen.defs,
    draw("rect", { width, height, fill: ground }),
    painted(element, pen),
    draw("text", { ...line, x: EDGE }, caption[0]),
    draw("text", { ...line, x: width - EDGE, "text-anchor": "end" }, caption[1]),
  );
}

/** The element and all in it as one group, or null where nothing is to be seen. */
function painted(element, pen) {
  if (element.matches(LEFT_OUT)) return null;
  const style = getComputedStyle(element);
  if (style.display === "none" || style.visibility === "hidden" || style.opacity === "0") return null;
  const at = placed(element.getBoundingClientRect(), pen);
  if (element.tagName === "CANVAS") return grouped([...boxed(style, at, pen), photographed(element, style, at)], style, at, pen);
  if (element.tagName.toLowerCase() === "svg") return grouped([...boxed(style, at, pen), traced(element, at)], style, at, pen);
  const parts = [...boxed(style, at, pen), ...marked(element, style, at, pen)];
  const typed = typedIn(element);
  if (typed !== null) parts.push(...lettered(typed, style, at, pen));
  else {
    for (const child of element.childNodes) {
      if (child.nodeType === 3) parts.push(...written(child, style, pen));
      else if (child.nodeType === 1) parts.push(painted(child, pen));
    }
  }
  return grouped(parts, style, at, pen);
}

function placed(rect, { x, y, by }) {
  return { x: rect.left / by - x, y: rect.top / by - y, width: rect.width / by, height: rect.height / by };
}

function grouped(parts, style, at, pen) {
  const some = parts.filter(Boolean);
  if (!some.length) return null;
  const cut = style.overflowX !== "visible" || style.overflowY !== "visible";
  const faint = Number(style.opacity) < 1;
  if (!cut && !faint) return some.length === 1 ? some[0] : draw("g", {}, some);
  const group = draw("g", { opacity: faint ? style.opacity : null }, some);
  if (cut) group.setAttribute("clip-path", `url(#${defined(pen, draw("clipPath", {}, draw("rect", { ...at, rx: radius(style, at) })))})`);
  return group;
}

function defined(pen, node) {
  pen.names += 1;
  node.id = `l${pen.names}`;
  pen.defs.append(node);
  return node.id;
}

const radius = (style, at) => Math.min(parseFloat(style.borderTopLeftRadius) || 0, at.width / 2, at.height / 2) || null;
const clear = (colour) => colour === "transparent" || /,\s*0\)$|\/\s*0\)$/.test(colour);

/** Background and border. */
function boxed(style, at, pen) {
  if (!at.width || !at.height) return [];
  const shapes = [];
  const rx = radius(style, at);
  if (!clear(style.backgroundColor)) shapes.push(draw("rect", { ...at, rx, fill: style.backgroundColor }));
  const shade = style.backgroundImage.includes("gradient(") ? gradient(style, at, pen) : null;
  if (shade) shapes.push(draw("rect", { ...at, rx, fill: `url(#${shade})` }));
  const sides = ["Top", "Right", "Bottom", "Left"].map((side) => ({ width: style[`border${side}Style`] === "none" ? 0 : parseFloat(style[`border${side}Width`]) || 0, colour: style[`border${side}Color`], dashed: style[`border${side}Style`] }));
  if (sides.every((side) => side.width > 0 && side.width === sides[0].width && side.colour === sides[0].colour)) {
    const { width: w, colour, dashed } = sides[0];
    const inner = { x: at.x + w / 2, y: at.y + w / 2, width: Math.max(0, at.width - w), height: Math.max(0, at.height - w) };
    if (!clear(colour)) shapes.push(draw("rect", { ...inner, rx: rx && Math.max(0, rx - w / 2), fill: "none", stroke: colour, "stroke-width": w, "stroke-dasharray": dashes(dashed, w) }));
    return shapes;
  }
  const [x2, y2] = [at.x + at.width, at.y + at.height];
  const lines = [[at.x, at.y, x2, at.y], [x2, at.y, x2, y2], [at.x, y2, x2, y2], [at.x, at.y, at.x, y2]];
  sides.forEach(({ width, colour, dashed }, i) => {
    if (!width || clear(colour)) return;
    const [a, b, c, d] = lines[i];
    const [dx, dy] = [[0, width / 2], [-width / 2, 0], [0, -width / 2], [width / 2, 0]][i];
    shapes.push(draw("line", { x1: a + dx, y1: b + dy, x2: c + dx, y2: d + dy, stroke: colour, "stroke-width": width, "stroke-dasharray": dashes(dashed, width) }));
  });
  return shapes;
}

const dashes = (kind, width) => (kind === "dashed" ? `${3 * width} ${2 * width}` : kind === "dotted" ? `${width} ${width}` : null);

/** A CSS gradient as one of SVG, or as a pattern where it repeats; the id of it, or null. */
function gradient(style, at, pen) {
  const source = /(repeating-)?linear-gradient\((.*)\)$/s.exec(style.backgroundImage);
  if (!source) return null;
  const parts = source[2].split(/,(?![^(]*\))/).map((part) => part.trim());
  const angle = /deg$/.test(parts[0]) ? parseFloat(parts.shift()) : 180;
  const stops = parts.map((part) => {
    const [, colour, places] = /^(.*?\)|[a-z]+|#\w+)\s*(.*)$/i.exec(part);
    return { colour, places: places.split(/\s+/).filter(Boolean) };
  });
  if (!source[1]) {
    const turn = ((angle - 90) * Math.PI) / 180;
    const [dx, dy] = [Math.cos(turn) / 2, Math.sin(turn) / 2];
    const node = draw("linearGradient", { x1: 0.5 - dx, y1: 0.5 - dy, x2: 0.5 + dx, y2: 0.5 + dy });
    stops.forEach(({ colour, places }, i) => {
      const [first, ...more] = places.length ? places : [`${(100 * i) / Math.max(1, stops.length - 1)}%`];
      for (const offset of [first, ...more]) node.append(draw("stop", { offset: offset.endsWith("px") ? parseFloat(offset) / at.width : offset, "stop-color": colour }));
    });
    return defined(pen, node);
  }
  const ends = stops.flatMap(({ places }) => places.map((place) => (place.endsWith("%") ? (parseFloat(place) * at.width) / 100 : parseFloat(place))));
  const period = Math.max(...ends, 1);
  const pattern = draw("pattern", { patternUnits: "userSpaceOnUse", width: period, height: period, patternTransform: `translate(${at.x} ${at.y}) rotate(${angle - 90})` });
  let from = 0;
  for (const { colour, places } of stops) {
    const marks = places.map((place) => (place.endsWith("%") ? (parseFloat(place) * at.width) / 100 : parseFloat(place)));
    const [a, b] = marks.length > 1 ? marks : [from, marks[0] ?? period];
    if (!clear(colour) && b > a) pattern.append(draw("rect", { x: a, width: b - a, height: period, fill: colour }));
    from = b;
  }
  return defined(pen, pattern);
}

/** A mark before the words, such as a legend's: the first thing in its line, in the middle of it. */
function marked(element, style, at, pen) {
  const mark = getComputedStyle(element, "::before");
  if (mark.content === "none" || mark.content === "normal" || mark.position === "absolute" || mark.display === "none") return [];
  const [width, height] = [parseFloat(mark.width), parseFloat(mark.height)];
  if (!width || !height) return [];
  const x = at.x + (parseFloat(style.paddingLeft) || 0) + (parseFloat(style.borderLeftWidth) || 0);
  return boxed(mark, { x, y: at.y + (at.height - height) / 2, width, height }, pen);
}

function photographed(canvas, style, at) {
  if (!canvas.width || !canvas.height) return null;
  const fine = Math.max(1, Math.round(canvas.width / at.width)); // its pixels to one of the page's: each stays one
  const [x, y] = [at.x, at.y].map((place) => Math.round(fine * place) / fine);
  const sharp = style.imageRendering === "pixelated" ? "image-rendering:pixelated" : null;
  const image = draw("image", { x, y, width: canvas.width / fine, height: canvas.height / fine, preserveAspectRatio: "none", href: canvas.toDataURL("image/png"), "aria-label": canvas.getAttribute("aria-label") });
  if (sharp) image.setAttribute("style", sharp);
  return image;
}

/** An SVG of the page, with the colours and fonts that style sheets gave it. */
function traced(picture, at) {
  const copy = picture.cloneNode(true);
  const [from, to] = [[picture, ...picture.querySelectorAll("*")], [copy, ...copy.querySelectorAll("*")]];
  from.forEach((node, i) => {
    const style = getComputedStyle(node);
    to[i].removeAttribute("class");
    to[i].removeAttribute("style");
    if (i) {
      for (const name of STYLED) {
        const value = style.getPropertyValue(name);
        if (value && value !== "none" && value !== "normal" && value !== "auto") to[i].style.setProperty(name, value);
        else if (name === "fill" || name === "stroke") to[i].style.setProperty(name, value);
      }
      if (style.display === "none") to[i].setAttribute("display", "none");
    }
  });
  for (const [name, value] of Object.entries(at)) copy.setAttribute(name, value);
  copy.setAttribute("overflow", "visible");
  for (const name of ["tabindex", "role"]) copy.removeAttribute(name);
  return copy;
}

/** What stands in a field that is typed into or chosen from; null for other elements. */
function typedIn(element) {
  if (element.tagName === "SELECT") return element.selectedOptions[0]?.textContent || "";
  if (element.tagName === "TEXTAREA") return element.value;
  if (element.tagName !== "INPUT") return null;
  return ["checkbox", "radio", "range"].includes(element.type) ? "" : element.value;
}

function lettered(text, style, at, pen) {
  const { ascent, descent } = pen.measure(style);
  const y = at.y + (at.height + ascent - descent) / 2;
  return text ? [draw("text", { x: at.x + (parseFloat(style.paddingLeft) || 0), y, ...font(style) }, text)] : [];
}

/** A text, line by line where the page broke it; each as wide as there, whatever font it is read with. */
function written(node, style, pen) {
  if (!node.data.trim()) return [];
  const { ascent, descent } = pen.measure(style);
  return lines(node, style).map(({ text, rect }) => {
    const at = placed(rect, pen);
    const y = at.y + (at.height * ascent) / (ascent + descent);
    return draw("text", { x: at.x, y, textLength: text.length > 1 ? at.width.toFixed(2) : null, lengthAdjust: "spacingAndGlyphs", ...font(style) }, text);
  });
}

function lines(node, style) {
  const range = document.createRange();
  const pre = style.whiteSpace.startsWith("pre");
  const shown = (from, to) => {
    range.setStart(node, from);
    range.setEnd(node, to);
    return [...range.getClientRects()].filter((rect) => rect.width > 0);
  };
  const cut = [];
  for (const match of node.data.matchAll(pre ? /[^\n]+/g : /\S+/g)) {
    const [from, to] = [match.index, match.index + match[0].length];
    const rects = shown(from, to);
    if (!rects.length) continue;
    const last = cut[cut.length - 1];
    if (last && Math.abs(last.top - rects[0].top) < 2 && rects.length === 1) last.to = to;
    else cut.push({ from, to, top: rects[0].top });
  }
  return cut.map(({ from, to }) => {
    const raw = node.data.slice(from, to);
    return { text: transformed(pre ? raw : raw.replace(/\s+/g, " "), style), rect: united(shown(from, to)) };
  });
}

function united(rects) {
  const left = Math.min(...rects.map((r) => r.left));
  const top = Math.min(...rects.map((r) => r.top));
  return { left, top, width: Math.max(...rects.map((r) => r.right)) - left, height: rects[0].height };
}

function transformed(text, { textTransform }) {
  if (textTransform === "uppercase") return text.toUpperCase();
  if (textTransform === "lowercase") return text.toLowerCase();
  return text;
}

function font(style) {
  const usual = (value, plain) => (value === plain ? null : value);
  return {
    fill: style.color,
    "font-family": style.fontFamily,
    "font-size": style.fontSize,
    "font-weight": usual(style.fontWeight, "400"),
    "font-style": usual(style.fontStyle, "normal"),
    "letter-spacing": usual(style.letterSpacing, "normal"),
    "text-decoration": style.textDecorationLine === "none" ? null : style.textDecorationLine,
  };
}

/** How far a font reaches above and below its line. */
function measurer() {
  const pen = document.createElement("canvas").getContext("2d");
  const known = new Map();
  return (style) => {
    const name = `${style.fontStyle} ${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    if (!known.has(name)) {
      pen.font = name;
      const { fontBoundingBoxAscent: ascent, fontBoundingBoxDescent: descent } = pen.measureText("x");
      known.set(name, { ascent, descent });
    }
    return known.get(name);
  };
}
