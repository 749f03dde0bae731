/**
 * A room, seen from a lesson's page. Whoever opened it leads: every move of its page is told. The others follow until
 * they move by themselves, and come back with one click. Messages are listed in CONTRIBUTING.md.
 */
import { throttled } from "./dom.js";
import { createLine, recallRoom, rememberRoom, seatHere } from "./line.js";
import { pollCard } from "./poll.js";
import { createRoomBar } from "./roombar.js";

const TELL_EVERY = 80; // milliseconds between two moves of a leader
const TELL_AGAIN = 2000; // when a move could not be told
const PLAYING_EVERY = 500; // while the player runs by itself, its step is told less often
const DRIFT = 0.35; // seconds that a follower's player may be off before it is put right

/**
 * `page` is {lesson, values, player, beats, knobs, models, notices, root, scene(), showScene(name)}; `places.rooms` is where rooms are.
 * Without it there are none: null.
 */
export function createRoom(page, places) {
  if (!places.rooms || location.protocol === "file:") return null;
  const { lesson, values, player, beats, knobs, notices } = page;
  const home = new URL(places.rooms, location.href);
  const polls = new Map(); // name of a poll -> {mine, counts, count}
  let room = null; // {code, key, own, leads, people, link, qr, there}
  let line = null;
  let leader = null; // where whoever leads is
  let applying = false;
  let card = null; // the poll on the page
  let turned = 0; // counts changes of knobs
  let told = "";

  const bar = createRoomBar({
    follow: () => setOwn(false),
    leave: () => gone(""),
    end: () => line?.send({ type: "end" }),
  });

  const draw = () => {
    bar.draw(room);
    card?.update();
  };
  const save = () => rememberRoom(room && { code: room.code, key: room.key, own: room.own });
  const quietly = (work) => {
    const before = applying;
    applying = true;
    try {
      work();
    } finally {
      applying = before;
    }
  };
  const following = () => Boolean(room && room.joined && !room.leads && !room.own);

  // Leading

  const here = () => ({
    lesson: lesson.slug,
    knobs: { ...values },
    beat: beats.index,
    scene: page.scene(),
    step: player.step,
    playing: player.playing,
    speed: player.speed,
  });
  const tell = throttled(() => room?.joined && room.leads && line?.send({ type: "lead", place: here() }), TELL_EVERY);
  const watch = () => {
    if (!room?.leads || !room.joined) return;
    const step = player.playing ? `plays ${Math.floor(performance.now() / PLAYING_EVERY)}` : player.step;
    const now = `${beats.index} ${page.scene()} ${step} ${player.speed} ${turned}`;
    if (now === told) return;
    told = now;
    tell();
  };

  // Following

  const apply = () => {
    if (!following() || !leader) return;
    if (leader.lesson !== lesson.slug) {
      location.replace(`${home.href}/${room.code}`);
      return;
    }
    quietly(() => {
      beats.taken();
      if (leader.beat !== beats.index) beats.open(leader.beat, { quietly: true });
      const scene = leader.scene || lesson.beats[leader.beat]?.scene;
      if (scene) page.showScene(scene);
      const other = Object.entries(leader.knobs).filter(([name, value]) => JSON.stringify(values[name]) !== JSON.stringify(value));
      if (other.length) {
        knobs.setAll(Object.fromEntries(other));
        page.models?.show(values.model);
      }
      move();
    });
  };
  const move = () => {
    player.speed = leader.speed;
    if (!leader.playing) {
      if (player.playing || player.step !== leader.step || player.want !== leader.step) player.waitFor(leader.step);
      return;
    }
    const off = Math.abs(player.position - leader.step) / (player.rate * player.speed);
    if (!player.playing || off > DRIFT) {
      player.waitFor(leader.step);
      player.play();
    }
  };
  const setOwn = (own) => {
    if (!room || room.own === own) return;
    room.own = own;
    save();
    draw();
    quietly(() => beats.again());
    if (!own) apply();
  };
  /** The learner moves by itself. */
  const touched = () => {
    if (!applying && following()) setOwn(true);
  };
  const clicked = (event) => {
    if (following() && event.composedPath().some((node) => node instanceof HTMLAnchorElement && node.href && !node.getAttribute("href").startsWith("#"))) setOwn(true);
  };
  page.root.addEventListener("click", clicked, { capture: true });
  const forget = player.listen(watch);

  // What the room says

  const pollOf = (name) => {
    if (!polls.has(name)) polls.set(name, {});
    return polls.get(name);
  };
  const handlers = {
    opened(message) {
      line.settled();
      Object.assign(room, { code: message.code, key: message.key, leads: true, joined: true, people: 0, link: message.link, qr: message.qr });
      save();
      quietly(() => beats.again());
      draw();
      bar.invite();
    },
    joined(message) {
      line.settled();
      const first = !room.joined;
      Object.assign(room, { code: message.code, leads: message.leads, joined: true, link: message.link, qr: message.qr });
      leader = message.place;
      for (const [name, mine] of Object.entries(message.mine)) pollOf(name).mine = mine;
      for (const [name, counts] of Object.entries(message.revealed)) pollOf(name).counts = counts;
      if (first) quietly(() => beats.again());
      draw();
      if (room.leads) tell();
      else apply();
    },
    place(message) {
      leader = message.place;
      apply();
    },
    people(message) {
      room.people = message.count;
      draw();
    },
    votes(message) {
      pollOf(message.poll).count = message.count;
      card?.update();
    },
    voted(message) {
      pollOf(message.poll).mine = message.option;
      card?.update();
    },
    revealed(message) {
      pollOf(message.poll).counts = message.counts;
      card?.update();
    },
    ended: (message) => gone(message.text),
    refused(message) {
      if (["open", "join"].includes(message.about)) {
        if (message.again && room.code) line.retry();
        else gone(message.text, "warning");
        return;
      }
      notices.add(message.text, "warning");
      if (message.again && room.leads) setTimeout(tell, TELL_AGAIN);
    },
  };

  const connect = () => {
    const url = new URL(`${home.href}/ws`);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const base = new URL(places.home || "./", location.href).href;
    line = createLine(url, {
      greet: () => (room.code ? { type: "join", code: room.code, seat: seatHere(), base, ...(room.key ? { key: room.key } : {}) } : { type: "open", place: here(), base }),
      heard: (message) => room && handlers[message.type]?.(message),
      changed(there) {
        room.there = there;
        draw();
      },
    });
  };
  const gone = (text, level = "info") => {
    line?.stop();
    line = null;
    room = null;
    leader = null;
    polls.clear();
    save();
    draw();
    quietly(() => beats.again());
    if (text) notices.add(text, level);
  };

  return {
    element: bar.element,
    /** For the header's menu. */
    offer: {
      label: "Open a room",
      title: "Others see what you do here, on their own devices",
      act() {
        if (room?.leads) bar.invite();
        else if (room) notices.add("You are in a room already: leave it first.");
        else {
          room = { code: "", own: false, there: false };
          connect();
        }
      },
    },
    /** Back in the room where this tab was, or into the one that the address names. */
    begin() {
      const known = recallRoom();
      if (!known) return;
      room = { code: known.code, key: known.key, own: Boolean(known.own), there: false };
      connect();
      draw();
    },
    touched,
    /** Beat, or its step: by the learner, unless it was for following. */
    moved() {
      if (room?.leads) watch();
      else touched();
    },
    /** Knobs were sent: whoever leads tells the room. */
    sent() {
      turned += 1;
      watch();
    },
    /** The card for a beat's question, while its poll is open to this page; else null. */
    card(predict, index, answer) {
      card = null;
      if (!room?.joined || (!room.leads && room.own)) return null;
      const name = `${lesson.slug}/${index}`;
      card = pollCard(predict, {
        answer,
        leads: room.leads,
        poll: () => ({ ...pollOf(name), people: room?.people }),
        vote: (option) => line?.send({ type: "vote", poll: name, option }),
        reveal: () => line?.send({ type: "reveal", poll: name }),
      });
      return card;
    },
    stop() {
      forget();
      page.root.removeEventListener("click", clicked, { capture: true });
      line?.stop();
    },
  };
}
