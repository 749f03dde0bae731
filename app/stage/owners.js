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

/** The newest frame of a track at a step: its numbers as rows (a single row where it has one axis); null without one. */
export function frameAt(store, tensor, step) {
  const track = store.of(tensor);
  const count = track ? track.countAt(step) : 0;
  if (!count) return null;
  const { shape, width } = track.row(count - 1);
  const across = shape[shape.length - 1];
  const down = shape.length > 1 ? shape[0] : 1;
  return Array.from({ length: down }, (_, i) => Array.from({ length: width }, (_, j) => track.value(count - 1, i * across + j)));
}
