/**
 * A small picture that moves: the first view of a saved scene, drawn by the same module as on the lesson's page, over
 * and over while it is in sight. `saved` is a list of messages: one picture, its rows and the text.
 */
import { make } from "./dom.js";
import { Player, calm } from "./player.js";
import { VIEWS } from "./scene.js";
import { originOf } from "./panel.js";
import { FONTS } from "./theme.js";
import { Store } from "./track.js";

const REST = 1600; // milliseconds of stillness at the end

export function createPreview(host, saved, base, { single = false, height = 170 } = {}) {
  const picture = saved.find((message) => message.type === "picture");
  const store = new Store(picture.run);
  store.model = picture.model || {};
  store.describe(picture.tracks);
  for (const message of saved) {
    if (message.type === "rows") store.rows(message);
    if (message.type === "pieces") store.text(message);
  }
  store.total = store.steps;
  const player = new Player();
  const silent = { near() {}, hide() {} };
  const context = Object.create(base, {
    store: { value: store },
    player: { value: player },
    tip: { value: silent },
    fonts: { value: FONTS },
    knobs: { value: {} },
    bare: { value: true },
    height: { value: height },
    single: { value: single },
    announce: { value() {} },
    exact: { value() {} },
    open: { value() {} },
    turn: { value() {} },
  });
  const view = picture.views[0];
  const box = make("div", { class: `view view-${view.kind} bare`, inert: true });
  host.append(box);
  const drawing = VIEWS[view.kind](box, view, context);
  let drawn = false;
  let timer = 0;

  player.listen(({ step, redraw }) => {
    if (redraw && drawing.draw(step)) drawn = true;
    if (!player.playing && !calm() && seen) again();
  });

  const again = () => {
    clearTimeout(timer);
    timer = setTimeout(() => player.play(), REST);
  };

  let seen = false;
  const watch = new IntersectionObserver((entries) => {
    seen = entries[entries.length - 1].isIntersecting;
    if (seen && !calm()) player.play();
    else {
      clearTimeout(timer);
      player.pause();
    }
  });
  const resized = new ResizeObserver(() => drawing.resize());

  return {
    start() {
      player.extend(store.steps, store.total);
      player.go(player.last);
      watch.observe(host);
      resized.observe(host);
    },
    redraw: () => player.redraw(),
    stop() {
      watch.disconnect();
      resized.disconnect();
      clearTimeout(timer);
      player.stop();
    },
    /** What is shown: the view's title, and of which model. */
    caption: [view.title, originOf(view, store, {}).text].filter(Boolean).join(" · "),
    get drawn() {
      return drawn;
    },
    get frames() {
      return player.frames;
    },
  };
}
