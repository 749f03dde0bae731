/** What each message from the server does to the page (CONTRIBUTING.md lists them). */
import { save } from "./tensors.js";

const STALE = 300; // milliseconds that the last run's facts stand while a new one is on its way
const OVER = ["done", "stopped", "cancelled", "failed"];

/** Returns take(message), with `href`: the link to this very place, once the server has told it. */
export function createInbox({ scenes, player, beats, transport, tabs, knobs, notices, asks, reel, wanted }) {
  let newest = ""; // the run that the server spoke of last
  let run = null;
  let forget = 0;
  let href = "";

  /** Another run began: its predecessor's facts may stand for a blink, not longer. */
  const renew = (id) => {
    if (id === newest) return;
    newest = id;
    clearTimeout(forget);
    forget = setTimeout(() => beats.facts({}), STALE);
    knobs.content();
    tabs.renew();
  };

  /** More of the run is here: the player may go further. */
  const grow = () => {
    const store = scenes.arrived();
    if (!store) return;
    if (run && run.run === store.run) store.total = OVER.includes(run.state) ? store.steps : run.total || store.total;
    player.extend(store.steps, store.total);
    transport.draw(player);
  };

  /** The store that rows of this run go to; null for a run that is no longer looked at. */
  const storeOf = (message) => (scenes.pending && scenes.pending.run === message.run ? scenes.pending : null);

  const handlers = {
    picture(message) {
      renew(message.run);
      const live = scenes.pending;
      if (live && live.run === message.run && wanted() && message.scene !== wanted()) {
        live.describe(message.tracks); // the page went on to another scene meanwhile, and shows it already
        return;
      }
      scenes.picture(message, reel.store(message.run));
      beats.given({ name: message.model?.name });
      knobs.bound(message.model || {});
      grow();
    },
    rows(message) {
      storeOf(message)?.rows(message);
      grow();
    },
    pieces(message) {
      storeOf(message)?.text(message);
      player.redraw();
    },
    words(message) {
      storeOf(message)?.learn(message);
      player.redraw();
    },
    run(message) {
      renew(message.run);
      run = message;
      transport.run(message);
      if (message.message && ["failed", "stopped"].includes(message.state) && !knobs.complain({ text: message.message, failed: true })) notices.add(message.message, "warning");
      grow();
    },
    facts(message) {
      if (newest && message.run !== newest) return;
      clearTimeout(forget);
      beats.facts(message.facts);
      transport.mark(message.marks || []);
      tabs.claims(message.claims || []);
    },
    notice(message) {
      if (!knobs.complain(message)) notices.add(message.text, message.level);
    },
    link(message) {
      const url = new URL(message.href, location.href);
      if (url.origin !== location.origin || location.protocol === "file:") return;
      const kernel = new URLSearchParams(location.search).get("kernel"); // which one Jupyter's preview runs the lesson in
      if (kernel) url.searchParams.set("kernel", kernel);
      href = url.href;
      history.replaceState(history.state, "", url);
    },
    cell: asks.answeredCell,
    exact: asks.answeredExact,
    calculated: asks.answeredSum,
    code: (message) => tabs.code(message.sources),
    tensors: (message) => tabs.tensors(message),
    tensor: (message) => tabs.tensor(message),
    file: (message) => save(message),
  };

  return {
    take: (message) => ("ahead" in message ? reel.take(message) : handlers[message.type]?.(message)),
    get href() {
      return href;
    },
  };
}
