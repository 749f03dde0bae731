/**
 * Whether the server is there: a ping every few seconds. What is on the page plays without it, so its absence is told
 * calmly; when it answers again the session is a new one, and the page takes up from its link.
 */

const EVERY = 5000; // between pings
const PATIENCE = 2500; // for a pong, before asking by HTTP
const RETRY = 1500; // between questions by HTTP
const GRACE = 4000; // for the old session to speak, once the server answers by HTTP

/** `onBack(known)`: the server is there, this session is not; `known` when it ever was. `quiet` asks nothing. */
export function createPulse({ send, onAway, onBack, onHere, quiet = false }) {
  let asked = 0; // when the oldest unanswered ping left, or 0
  let there = 0; // since when the server answers by HTTP, or 0
  let state = "here";
  let known = false;

  const ping = () => {
    if (!asked) asked = performance.now();
    try {
      send({ type: "ping" });
    } catch {
      // The connection is closed: the silence that follows says so.
    }
  };

  const look = async () => {
    if (!asked || performance.now() - asked < PATIENCE || state === "back") return;
    const answers = await reachable();
    if (!asked) return; // it spoke meanwhile
    there = answers ? there || performance.now() : 0;
    if (!answers && state === "here") {
      state = "away";
      onAway();
    } else if (answers && (state === "away" || performance.now() - there > GRACE)) {
      state = "back";
      onBack(known);
    }
  };

  const timers = quiet ? [] : [setInterval(ping, EVERY), setInterval(look, RETRY)];
  return {
    /** Any message shows that the session lives. */
    heard() {
      asked = 0;
      there = 0;
      known = true;
      if (state !== "here") onHere();
      state = "here";
    },
    stop: () => timers.forEach(clearInterval),
  };
}

async function reachable() {
  try {
    const reply = await fetch(location.href, { method: "HEAD", cache: "no-store" });
    return reply.status < 500;
  } catch {
    return false;
  }
}
