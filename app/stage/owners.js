/** Whose memory it is: a letter and a hue for each text. Forks of one text share the letter and add a stroke to it. */

const HUES = ["query", "key", "value", "heavy", "recent", "recomputed", "sink", "alarm"];

export function hueOf(owner) {
  return HUES[owner % HUES.length];
}

export function letterOf(families, owner) {
  const family = families[owner] ?? owner;
  const elder = families.slice(0, owner).filter((other) => other === family).length;
  return String.fromCharCode(65 + (family % 26)) + "′".repeat(elder);
}
