/**
 * What the beats will show, kept in the page: every scene, of every setting of the knobs that they come by
 * (app/ahead.py sends it). What is kept is shown at once, and plays on when the server is gone.
 */
import { Store } from "./track.js";

const KEPT_STATES = 24; // settings of the knobs that are kept

/** `replay(messages)` shows them as if they had just come; `live(run)` is the store of a run on the stage, or null. */
export function createReel({ replay, live }) {
  const runs = new Map(); // run -> {store, run, facts}: its rows, and its last messages of these types
  const states = new Map(); // number -> key of the knobs
  const kept = new Map(); // key of the knobs -> {run, pictures: scene -> message}
  let told = null; // how much is kept, once all has come

  const of = (id) => {
    if (!runs.has(id)) runs.set(id, { store: live(id) || new Store(id), run: null, facts: null });
    return runs.get(id);
  };

  const trim = () => {
    for (const key of [...kept.keys()].slice(0, -KEPT_STATES)) kept.delete(key);
    const used = new Set([...kept.values()].map(({ run }) => run));
    for (const id of runs.keys()) if (!used.has(id)) runs.delete(id);
  };

  const handlers = {
    state(message) {
      const key = keyOfKnobs(message.knobs);
      states.set(message.ahead, key);
      kept.delete(key);
      kept.set(key, { run: message.run, pictures: new Map() });
      of(message.run);
      told = null;
      trim();
    },
    picture(message) {
      const { ahead, ...picture } = message;
      const { store } = of(message.run);
      store.model = message.model || {};
      store.total = Math.max(store.total, message.steps || 0);
      store.describe(message.tracks);
      kept.get(states.get(ahead))?.pictures.set(message.scene, picture);
    },
    rows: (message) => of(message.run).store.rows(message),
    pieces: (message) => of(message.run).store.text(message),
    words: (message) => of(message.run).store.learn(message),
    run({ ahead, ...message }) {
      of(message.run).run = message;
    },
    facts({ ahead, ...message }) {
      of(message.run).facts = message;
    },
    ahead(message) {
      told = { kept: message.kept, of: message.of, left: message.left };
    },
  };

  return {
    take: (message) => handlers[message.type]?.(message),
    /** The store that holds what is kept of a run. */
    store: (id) => runs.get(id)?.store || null,
    has: (values) => kept.has(keyOfKnobs(values)),
    /** Show a scene of the run at these knobs, if it is kept. */
    show(values, scene) {
      const state = kept.get(keyOfKnobs(values));
      const picture = state && (scene ? state.pictures.get(scene) : [...state.pictures.values()][0]);
      if (!picture) return false;
      const { run, facts } = of(state.run);
      replay([picture, run, facts].filter(Boolean));
      return true;
    },
    /** {kept, of, left: sentences} once everything that can be kept is here; null before. */
    get told() {
      return told;
    },
  };
}

function keyOfKnobs(values) {
  return JSON.stringify(Object.entries(values).sort(([a], [b]) => (a < b ? -1 : 1)));
}
