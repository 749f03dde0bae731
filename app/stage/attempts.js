/** The tries that a browser keeps of a lesson: a bounded list in its storage, of which nothing is taken for granted. */

const MOST_TRIES = 60;
const LONG = 240; // characters of a try's words, or of what it may be compared with
/** Runs whose tries were dropped by hand: while they stand on the page they are not kept again. */
export const forgotten = new Set();

const memory = new Map(); // for browsers that keep nothing: until the page is left

function keyOfTries(slug) {
  return `leanscope-tries-${slug}`;
}

/** What a stored thing is, if it is a try: {token, group, words, x, y, figures}; null for anything else. */
function soundTry(thing) {
  if (!thing || typeof thing !== "object") return null;
  const { token, group, words, x, y, figures } = thing;
  const text = (value) => typeof value === "string" && value.length <= LONG;
  const fine = typeof token === "string" && /^[\w-]{0,2048}$/.test(token) && text(group) && text(words) && Number.isFinite(x) && Number.isFinite(y);
  if (!fine || !Array.isArray(figures) || figures.length > 8) return null;
  return { token, group, words, x, y, figures: figures.map((value) => (Number.isFinite(value) ? value : null)) };
}

/** All tries of a lesson, oldest first, and whether the browser keeps them. */
export function triesOf(slug) {
  try {
    const stored = JSON.parse(window.localStorage.getItem(keyOfTries(slug)) || "[]");
    const list = Array.isArray(stored) ? stored.map(soundTry).filter(Boolean).slice(-MOST_TRIES) : [];
    return { list: memory.get(slug) || list, kept: !memory.has(slug) };
  } catch (error) {
    if (error instanceof SyntaxError) return { list: [], kept: true }; // garbage: the next try takes its place
    return { list: memory.get(slug) || [], kept: false };
  }
}

/** Put this list in place of what was kept; false where the browser refuses. */
export function keepTries(slug, list) {
  const few = list.slice(-MOST_TRIES);
  try {
    if (few.length) window.localStorage.setItem(keyOfTries(slug), JSON.stringify(few));
    else window.localStorage.removeItem(keyOfTries(slug));
    memory.delete(slug);
    return true;
  } catch {
    memory.set(slug, few);
    return false;
  }
}

/** The same try again takes the place of the old one. */
export function addTry(slug, attempt) {
  const sound = soundTry(attempt);
  if (!sound) return;
  const { list } = triesOf(slug);
  const same = list.findIndex(({ token, group }) => token === sound.token && group === sound.group);
  if (same >= 0 && JSON.stringify(list[same]) === JSON.stringify(sound)) return;
  keepTries(slug, same >= 0 ? list.map((one, i) => (i === same ? sound : one)) : [...list, sound]);
}

/** Those that no other beats in both: for each, none is as small and better, or as good and smaller. */
export function frontOf(points) {
  const beats = (a, b) => a.x <= b.x && a.y <= b.y && (a.x < b.x || a.y < b.y);
  return points.filter((point) => !points.some((other) => beats(other, point))).sort((a, b) => a.x - b.x);
}
