/** A lesson's page: its parts, and how they hang together. */
import { createAsks } from "./asks.js";
import { createBeats } from "./beats.js";
import { createCell } from "./cell.js";
import { palette } from "./colours.js";
import { make, say, throttled } from "./dom.js";
import { createHeader } from "./header.js";
import { createInbox } from "./inbox.js";
import { listenKeys } from "./keys.js";
import { createKnobs, createModels } from "./knobs.js";
import { createNotices } from "./notices.js";
import { Player } from "./player.js";
import { expose, presenting } from "./present.js";
import { createPresenter } from "./presenter.js";
import { createPulse } from "./pulse.js";
import { markRecorded } from "./recorded.js";
import { createReel } from "./reel.js";
import { createRoom } from "./room.js";
import { createScene } from "./scene.js";
import { createTabs } from "./tabs.js";
import { createTakeaway } from "./takeaway.js";
import { FONTS } from "./theme.js";
import { createTip } from "./tip.js";
import { createTransport } from "./transport.js";

const PLACE_EVERY = 220; // milliseconds between two reports of where the learner is

export function lessonPage({ root, model, places, theme }) {
  const lesson = model.get("lesson");
  const start = model.get("start") || {};
  const send = (message) => {
    try {
      model.send_msg(message);
    } catch {
      // The connection is closed: the pulse says so, and what is here plays on.
    }
  };
  const values = { ...Object.fromEntries(lesson.knobs.map((spec) => [spec.name, spec.default])), ...(start.knobs || {}) };
  const defaults = Object.fromEntries(lesson.knobs.map((spec) => [spec.name, spec.default]));
  const player = new Player();
  const tip = createTip(root);
  const notices = createNotices();
  const spoken = make("div", { class: "visually-hidden", "aria-live": "polite" });
  const stage = make("div", { class: "stage" });
  const cell = createCell({ closed: () => asks.forget() });
  const asks = createAsks(send, player, cell);

  /** What every view is given; each gets its store besides. */
  const base = {
    player,
    tip,
    fonts: FONTS,
    knobs: values,
    colours: palette(root),
    theme: `${root.dataset.theme} 0`,
    bare: false,
    turn: (name, value) => knobs.set(name, value),
    /** Turn many knobs at once, as to a try of before. */
    turnTo(given) {
      knobs.setAll(given);
      models?.show(values.model);
      player.redraw();
    },
    lesson: { slug: lesson.slug, defaults, href: places.embedded ? null : linkTo },
    edit: (name, row, column) => knobs.edit(name, row, column),
    announce: (text) => say(spoken, text),
    exact: asks.exact,
  };
  const scenes = createScene(stage, base, {
    open(index, view, at) {
      asks.cell(index, at);
      if (presenter.away) cell.show({ error: "The arithmetic comes from the server, which is away." });
      beats.opened(view.name);
    },
    calculate: asks.calculate,
    lit: (element) => present.lit(element),
  });
  const reel = createReel({
    replay: (messages) => messages.forEach((message) => inbox.take(message)),
    live: (run) => (scenes.pending && scenes.pending.run === run ? scenes.pending : null),
  });

  let scene = "";
  const showScene = (name) => {
    if (name === scene) return;
    scene = name;
    reel.show(values, name);
    send({ type: "scene", scene: name });
  };

  const inHeader = "model" in values && lesson.models?.length > 0;
  const knobs = createKnobs(
    lesson.knobs.filter((spec) => !(inHeader && spec.name === "model")),
    values,
    {
      send(all) {
        notices.clear();
        if (!reel.show(all, scene) && presenter.away) notices.add("The server is away, and this setting was not fetched ahead: the picture is still that of the run before.", "warning");
        send({ type: "knobs", values: all });
        room?.sent();
        presenter.turned();
      },
      turned(name) {
        models?.show(values.model);
        room?.touched();
        beats.turned(name);
        player.redraw();
      },
    },
  );
  const models = inHeader ? createModels(lesson.models, values.model, (value) => knobs.set("model", value)) : null;
  if (lesson.recorded) markRecorded(lesson.recorded, lesson, knobs, models);
  const sendPlace = throttled(() => send({ type: "place", beat: beats.index, step: player.step }), PLACE_EVERY);
  const moved = () => {
    sendPlace();
    presenter.moved();
    room?.moved();
  };
  const beats = createBeats(lesson, { values, player, knobs, tip, showScene, light: scenes.light, changed: moved, poll: (...question) => room?.card(...question) });

  /** The learner takes the player in hand: from now on no beat pulls it elsewhere. */
  const taken = () => {
    beats.taken();
    room?.touched();
  };
  const inHand = (work) => () => {
    taken();
    work();
  };
  const toggle = inHand(() => {
    player.toggle();
    if (player.playing) beats.played();
  });
  const transport = createTransport(player, lesson.step_word || "step", { toggle, taken, stop: () => send({ type: "stop" }) });
  const tabs = createTabs(send, player, lesson.footnote, places.explore);
  const inbox = createInbox({ scenes, player, beats, transport, tabs, knobs, notices, asks, reel, wanted: () => scene });
  const present = presenting(root, { changed: () => presenter.changed() });
  const presenter = createPresenter({ lesson, root, places, present, beats, player, reel, notices, send, inHand, toggle, redraw: () => themed() });
  const room = createRoom({ lesson, values, player, beats, knobs, models, notices, root, showScene, scene: () => scene }, places);
  const more = room ? [room.offer] : []; // what the header's menu offers: {label, title, act}
  if (!places.embedded) more.push({ label: "Open as notebook", title: "A .ipynb with these knobs, for Jupyter", act: () => send({ type: "download", what: "notebook" }) });
  const takeaway = createTakeaway({
    lesson,
    folder: places.fonts,
    page: {
      player,
      send,
      word: lesson.step_word || "step",
      away: () => presenter.away,
      name: () => scenes.scene,
      place: () => ({ knobs: values, beat: beats.index, step: player.step }),
      scenes: {
        element: () => scenes.element,
        draw: scenes.draw,
        resize: scenes.resize,
        captions: (at) => [`${lesson.title || lesson.slug} · ${lesson.step_word || "step"} ${at + 1} of ${player.total}`, `${scenes.store?.model.name || ""} · Leanscope`],
        colours: () => ({ ground: base.colours.role("paper"), ink: base.colours.role("muted") }),
      },
    },
  });
  more.push(takeaway.offer);
  const header = createHeader({ lesson, home: places.home, models, theme, present, tools: presenter.element, more, share: () => inbox.href || location.href });
  const skip = (event) => {
    event.preventDefault();
    beats.focus();
  };

  root.append(
    make("a", { class: "skip", href: "#story", on: { click: skip } }, "Skip to the lesson"),
    header,
    ...(room ? [room.element] : []),
    make(
      "main",
      { class: "lesson" },
      make("div", { class: "question" }, make("p", { class: "kicker" }, `Lesson ${lesson.order}`), make("h1", {}, lesson.question)),
      notices.element,
      make(
        "div",
        { class: "columns" },
        beats.element,
        stage,
        make("aside", { class: "side", "aria-label": "Knobs" }, make("h2", { class: "side-title" }, "Turn"), knobs.element, cell.element),
        transport.element,
      ),
      tabs.element,
      spoken,
    ),
    takeaway.element,
  );

  let drawn = false;
  let drawnRun = "";
  let placed = -1;
  player.listen(({ step, redraw }) => {
    // Where nothing stands at this step yet, a picture of the whole run is as ready as it will be.
    if (redraw && (scenes.draw(step) || scenes.whole)) {
      drawn = true;
      drawnRun = scenes.store.run;
    }
    if (step === placed) return;
    placed = step;
    sendPlace();
  });

  const pulse = createPulse({
    send,
    quiet: places.embedded,
    onAway() {
      presenter.away = true;
      notices.away();
    },
    onHere() {
      presenter.away = false;
      notices.here();
    },
    onBack(known) {
      const reload = () => location.reload();
      if (known && !player.playing && !present.on()) reload();
      else notices.back(reload);
    },
  });
  model.on("msg:custom", (event) => {
    pulse.heard();
    inbox.take(event.data ?? event);
  });

  const stopKeys = listenKeys({
    k: toggle,
    p: toggle,
    ",": inHand(() => player.by(-1)),
    Home: inHand(() => player.go(0)),
    End: inHand(() => player.go(player.last)),
    t: scenes.flip,
    Escape() {
      tip.hide();
      cell.hide();
      present.lift();
    },
    ...presenter.keys,
  }, places.embedded ? root : document, (key) => present.on() && key.startsWith("Page"));

  const resized = new ResizeObserver(() => {
    scenes.resize();
    player.redraw();
  });
  resized.observe(stage);

  if (start.present) present.toggle();
  (start.notices || []).forEach((text) => notices.add(text, "warning"));
  begin();
  expose({ lesson, player, ready: () => drawn, run: () => drawnRun });
  send({ type: "ready" });
  room?.begin();

  /** Where the link says; else where the first beat says; else at the newest step. */
  function begin() {
    const linked = typeof start.step === "number";
    beats.open(Math.max(0, Math.min(start.beat || 0, lesson.beats.length - 1)), { quietly: linked });
    if (!linked) return;
    const beat = lesson.beats[beats.index];
    if (beat && beat.scene) showScene(beat.scene);
    player.waitFor(start.step);
  }

  /** This page's address with that token. */
  function linkTo(token) {
    const url = new URL(location.href);
    url.searchParams.delete("s");
    if (token) url.searchParams.set("s", token);
    return url.href;
  }

  function themed() {
    base.colours = palette(root);
    base.theme = `${root.dataset.theme} ${performance.now()}`;
    player.redraw();
  }

  return {
    themed,
    stop() {
      present.stop();
      presenter.stop();
      stopKeys();
      room?.stop();
      pulse.stop();
      resized.disconnect();
      player.stop();
    },
  };
}
