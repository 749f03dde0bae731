/** Finds, among the snapshots of a page that is files, the recording of a setting of the knobs, and its pictures. */

const PLACEHOLDER = /⟨(\w+)⟩/g;

export function createFinder(lesson, snapshots) {
  const looks = lesson.knobs.filter((spec) => spec.look).map((spec) => spec.name);
  const ran = lesson.knobs.filter((spec) => !spec.look).map((spec) => spec.name);
  const specOf = (name) => lesson.knobs.find((spec) => spec.name === name);
  const differing = (snapshot, values) => ran.filter((name) => snapshot.values[name] !== values[name]);
  const exactly = (values) => snapshots.findIndex((snapshot) => !differing(snapshot, values).length);

  const shown = (name, value) => {
    const spec = specOf(name);
    if (spec.kind === "switch") return value ? "on" : "off";
    if (spec.kind === "text") return "of your own";
    return spec.options?.find((option) => option.value === value)?.label ?? String(value);
  };

  const sceneOf = (snapshot, name) => snapshot.scenes.find((one) => one.scene === name) || snapshot.scenes[0];

  /** A look knob's value as it stands in the names of tracks; null for one that is not kept. */
  const text = (snapshot, name, values) => snapshot.looks[name]?.find(([value]) => value === values[name])?.[1] ?? null;

  const picture = (snapshot, name, values) => {
    const { scene, views, steps, model } = sceneOf(snapshot, name);
    const ids = new Set();
    const filled = JSON.parse(JSON.stringify(views), (key, value) => {
      if (key !== "track" || typeof value !== "string") return value;
      const id = value.replace(PLACEHOLDER, (_, look) => text(snapshot, look, values) ?? "?");
      ids.add(id);
      return id;
    });
    const found = [...ids].filter((id) => snapshot.tracks[id]);
    const tracks = Object.fromEntries(found.map((id) => [id, snapshot.tracks[id].about]));
    return { picture: { type: "picture", run: snapshot.run.run, scene, views: filled, tracks, steps, model, knobs: snapshot.values }, ids: found, lost: [...ids].some((id) => id.includes("?") || snapshot.tracks[id] === null) };
  };

  const missingAt = (name, values) => ({ name, label: specOf(name).label, text: shown(name, values[name]) });

  return {
    exactly,
    sceneOf,
    text,
    picture,
    words: (values) => Object.entries(values).map(([name, value]) => `${specOf(name).label} ${shown(name, value)}`).join(", "),
    /**
     * The snapshot for `wanted`, turned from `values`: {found, also: knobs that had to be set with it}; or {missing: the
     * knob whose setting no snapshot has}.
     */
    find(values, wanted) {
      const turned = ran.filter((name) => wanted[name] !== values[name]);
      let found = exactly(wanted);
      if (found < 0) {
        const fitting = snapshots.filter((snapshot) => turned.every((name) => snapshot.values[name] === wanted[name]));
        const near = (a, b) => (differing(a, wanted).length <= differing(b, wanted).length ? a : b);
        if (!turned.length || !fitting.length) return { found, also: {}, missing: missingAt(turned[0] ?? ran[0], wanted) };
        found = snapshots.indexOf(fitting.reduce(near));
      }
      const snapshot = snapshots[found];
      const look = looks.find((name) => text(snapshot, name, wanted) === null);
      const lost = !look && snapshot.scenes.some(({ scene }) => picture(snapshot, scene, wanted).lost);
      if (look || lost) {
        const changed = looks.find((name) => wanted[name] !== values[name]);
        const kept = Object.fromEntries(looks.map((name) => [name, snapshot.values[name]]));
        if (found !== exactly(values)) return { found, also: { ...alsoOf(snapshot, wanted), ...kept } };
        return { found, also: {}, missing: missingAt(look ?? changed ?? looks[0], wanted) };
      }
      return { found, also: alsoOf(snapshot, wanted) };
    },
  };

  function alsoOf(snapshot, wanted) {
    return Object.fromEntries(differing(snapshot, wanted).map((name) => [name, snapshot.values[name]]));
  }
}
