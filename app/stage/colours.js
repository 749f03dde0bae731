/**
 * Colours: one meaning each, on all pages. The roles are CSS variables (assets/styles/tokens.css), read again when the
 * theme changes; colour scales are tables of 256 packed RGBA numbers, ready for a Uint32Array over ImageData.
 */
import { CIVIDIS, DIVERGING, LINEAR } from "./maps.js";

const ROLES = ["query", "key", "value", "sink", "heavy", "recent", "recomputed", "kept", "alarm", "ink"];
const PLAIN = ["paper", "panel", "line", "muted", "sunk", "hatch", "faint"];

/** Which role's hue a named scale has. */
const RAMPS = { attention: "sink", sink: "sink", query: "query", key: "key", value: "value", recent: "recent" };

/** What a slot's state looks like: a role, or hatching. */
export const STATES = {
  empty: "",
  kept: "kept",
  sink: "sink",
  recent: "recent",
  recomputed: "recomputed",
  heavy: "heavy",
  evicted: "hatch",
  plan: "recomputed",
  anchor: "heavy",
  both: "sink",
};

/** The palette as it stands on `root` now. */
export function palette(root) {
  const style = getComputedStyle(root);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  const roles = Object.fromEntries([...ROLES, ...PLAIN].map((name) => [name, read(name)]));
  const dark = root.dataset.theme === "dark";
  const tables = new Map();
  const table = (name, key, make) => {
    if (!tables.has(key)) tables.set(key, make());
    return tables.get(key);
  };
  const scale = (name) =>
    table(name, name, () => {
      if (name in RAMPS || ROLES.includes(name)) return ramp(roles[RAMPS[name] || name], dark);
      if (name === "diverging") return dark ? diverging(roles.query, roles.key) : unpack(DIVERGING);
      if (name === "cividis") return unpack(CIVIDIS);
      return dark ? unpack(LINEAR) : reversed(unpack(LINEAR));
    });
  return {
    dark,
    role: (name) => roles[name] || roles.ink,
    ink: (name) => read(`${name}-ink`) || roles[name] || roles.ink,
    scale,
    /** Without colour: what a mask leaves out. Its ground is darker than a scale's, so that its edge is seen at once. */
    closed: (name) =>
      name === "diverging"
        ? table("closed", "folded", () => folded(greys(hexToRgb(roles.line), hexToRgb(roles.muted))))
        : table("closed", "closed", () => greys(hexToRgb(roles.line), hexToRgb(roles.ink))),
    /** Codes rather than amounts: the colour of the nearest of as many codes. */
    states: (names) => {
      const key = `states ${names.join()}`;
      const colour = (i) => pack(...hexToRgb(roles[names[Math.round((i / 255) * (names.length - 1))]] || roles.ink));
      return table(key, key, () => Uint32Array.from({ length: 256 }, (_, i) => colour(i)));
    },
    /** The same scale, stepped back towards the panel: what is reused rather than computed now. */
    dimmed: (name) => table(name, `dim ${name}`, () => mixed(scale(name), hexToRgb(roles.panel), 0.42)),
  };
}

/** Packed RGBA (little endian, as in a Uint32Array over ImageData) as a CSS colour. */
export function css(packed) {
  return `rgb(${packed & 255} ${(packed >> 8) & 255} ${(packed >> 16) & 255})`;
}

/** Whether dark ink reads better than light on a packed colour. */
export function wantsDarkInk(packed) {
  const [r, g, b] = [packed & 255, (packed >> 8) & 255, (packed >> 16) & 255];
  return 0.299 * r + 0.587 * g + 0.114 * b > 140;
}

function pack(r, g, b) {
  const byte = (x) => Math.max(0, Math.min(255, Math.round(x)));
  return ((255 << 24) | (byte(b) << 16) | (byte(g) << 8) | byte(r)) >>> 0;
}

function unpack(hex) {
  return Uint32Array.from({ length: 256 }, (_, i) => pack(...hexToRgb(hex.slice(6 * i, 6 * i + 6))));
}

function reversed(table) {
  return table.slice().reverse();
}

function mixed(table, [r, g, b], share) {
  const mix = (from, to) => from + (to - from) * share;
  return table.map((c) => pack(mix(c & 255, r), mix((c >> 8) & 255, g), mix((c >> 16) & 255, b)));
}

/** A scale of size alone, for values on both sides of zero. */
function folded(table) {
  return table.map((_, i) => table[Math.round(Math.abs(2 * i - 255))]);
}

function greys(from, to) {
  return Uint32Array.from({ length: 256 }, (_, i) => pack(...from.map((low, k) => low + ((to[k] - low) * i) / 255)));
}

function hexToRgb(hex) {
  const digits = hex.replace("#", "");
  return [0, 2, 4].map((i) => parseInt(digits.slice(i, i + 2), 16));
}

/**
 * A scale in one hue whose lightness falls (or, at night, rises) evenly: read by lightness alone it is the same scale,
 * so no eye is left out. Chroma is that of the role in the middle and fades at both ends.
 */
function ramp(hex, dark) {
  const [, a, b] = toOklab(hexToRgb(hex));
  const [from, to] = dark ? [0.25, 0.95] : [0.965, 0.3];
  return Uint32Array.from({ length: 256 }, (_, i) => {
    const t = i / 255;
    const chroma = Math.min(1, 0.08 + 1.9 * t) * Math.min(1, 0.25 + 1.9 * (1 - t));
    return pack(...fromOklab([from + (to - from) * t, a * chroma, b * chroma]));
  });
}

/** At night: two hues that grow lighter away from a dark middle. */
function diverging(low, high) {
  const [, la, lb] = toOklab(hexToRgb(low));
  const [, ha, hb] = toOklab(hexToRgb(high));
  return Uint32Array.from({ length: 256 }, (_, i) => {
    const t = (i - 127.5) / 127.5;
    const size = Math.abs(t);
    const [a, b] = t < 0 ? [la, lb] : [ha, hb];
    const chroma = Math.min(1, 1.6 * size);
    return pack(...fromOklab([0.25 + 0.6 * size, a * chroma, b * chroma]));
  });
}

function toOklab(rgb) {
  const [r, g, b] = rgb.map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return [
    0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
    1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s,
  ];
}

function fromOklab([L, a, b]) {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((v) => 255 * (v <= 0.0031308 ? 12.92 * v : 1.055 * v ** (1 / 2.4) - 0.055));
}
