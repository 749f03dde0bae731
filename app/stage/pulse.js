/**
 * Whether the server is there: a ping every few seconds. What is on the page plays without it, so its absence is told
 * calmly; when it answers again the session is a new one, and the page takes up from its link.
 */

const EVERY = 5000; // between pings
const PATIENCE = 4000; // for a pong, before asking by HTTP
const RETRY = 2000; // between questions by HTTP

export function createPulse({ send, onAway, onBack, onHere }) {
  let asked = 0; // when the oldest unanswered ping left, or 0
  let away = false;

  const reachable = async () => {
    try {
      const reply = await fetch(location.href, { method: "HEAD", cache: "no-store" });
      return reply.status < 500;
    } catch {
      return false;
    }
  };

  const ping = () => {
    if (!asked) asked = performance.now();
    try {
      send({ type: "ping" });
    } catch {
      // The connection is closed: the silence that follows says so.
    }
  };

  const look = async () => {
    if (!asked || performance.now() - asked < PATIENCE) return;
    const there = await reachable();
    if (!asked) return; // it answered meanwhile
    if (!there && !away) {
      away = true;
      onAway();
    } else if (there && (away || performance.now() - asked > 3 * PATIENCE)) {
      away = true;
      onBack();
    }
  };

  const timers = [setInterval(ping, EVERY), setInterval(look, RETRY)];
  return {
    /** Any message shows that the server lives. */
    heard() {
      asked = 0;
      if (away) onHere();
      away = false;
    },
    stop: () => timers.forEach(clearInterval),
  };
}
