/** The token of a place, `?s=`, as app/link.py writes and reads it: here for pages that no server answers. */

const TOKEN_VERSION = 1;
const LONGEST_TOKEN = 2048;

/** `place`: {knobs, beat, step}; knobs at their defaults are left out. "" for the beginning. */
export function tokenOf({ knobs, beat, step }, defaults) {
  const turned = Object.keys(knobs).sort().filter((name) => knobs[name] !== defaults[name]);
  const state = {
    ...(beat ? { beat } : {}),
    ...(turned.length ? { knobs: Object.fromEntries(turned.map((name) => [name, knobs[name]])) } : {}),
    ...(step ? { step } : {}),
  };
  if (!Object.keys(state).length) return "";
  const bytes = new TextEncoder().encode(JSON.stringify({ ...state, v: TOKEN_VERSION }));
  const token = btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
  return token.length > LONGEST_TOKEN ? "" : token;
}

/** {knobs, beat, step} of a token; null for one that can't be read. */
export function placeOf(token) {
  try {
    if (token.length > LONGEST_TOKEN) return null;
    const bytes = Uint8Array.from(atob(token.replaceAll("-", "+").replaceAll("_", "/")), (character) => character.charCodeAt(0));
    const state = JSON.parse(new TextDecoder().decode(bytes));
    const whole = (value) => Number.isInteger(value) && value >= 0;
    const { v, knobs = {}, beat = 0, step = 0 } = state;
    if (v !== TOKEN_VERSION || !whole(beat) || !whole(step) || typeof knobs !== "object" || !knobs) return null;
    return { knobs, beat, step };
  } catch {
    return null;
  }
}
