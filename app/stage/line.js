/**
 * The way into a room: a WebSocket that comes back by itself, and what this tab and this browser remember. The leader's
 * key is kept in this tab alone, never in an address.
 */

const KEPT_ROOM = "leanscope-room"; // of this tab: {code, key, own}
const KEPT_SEAT = "leanscope-seat"; // of this browser: one vote each
const SOONEST = 250; // milliseconds before the first attempt to come back
const LATEST = 5000;

/** A browser that keeps nothing still has a room, until the page is left. */
function kept(storage, key) {
  try {
    return window[storage].getItem(key);
  } catch {
    return null;
  }
}

function keep(storage, key, text) {
  try {
    if (text === null) window[storage].removeItem(key);
    else window[storage].setItem(key, text);
  } catch {
    // See above.
  }
}

/** The room that this tab is in: as the address says, else as it was before the page was loaded. */
export function recallRoom() {
  let known = null;
  try {
    known = JSON.parse(kept("sessionStorage", KEPT_ROOM));
  } catch {
    known = null;
  }
  const url = new URL(location.href);
  const asked = (url.searchParams.get("room") || "").replace(/[^a-z0-9]/gi, "").toUpperCase();
  if (!asked) return known && typeof known.code === "string" ? known : null;
  url.searchParams.delete("room");
  history.replaceState(history.state, "", url);
  const room = known?.code === asked ? { ...known, own: false } : { code: asked };
  rememberRoom(room);
  return room;
}

export function rememberRoom(room) {
  keep("sessionStorage", KEPT_ROOM, room && JSON.stringify(room));
}

/** What tells this browser's vote from another's. */
export function seatHere() {
  const known = kept("localStorage", KEPT_SEAT);
  if (/^[\w-]{16,64}$/.test(known || "")) return known;
  const seat = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  keep("localStorage", KEPT_SEAT, seat);
  return seat;
}

/** `greet()` is said first, each time; `heard(message)`; `changed(there)` when the way opens or closes. */
export function createLine(url, { greet, heard, changed }) {
  let socket = null;
  let timer = 0;
  let tries = 0;
  let over = false;

  const open = () => {
    clearTimeout(timer);
    const opened = new WebSocket(url);
    socket = opened;
    opened.addEventListener("open", () => {
      changed(true);
      opened.send(JSON.stringify(greet()));
    });
    opened.addEventListener("message", (event) => {
      if (socket !== opened) return;
      heard(JSON.parse(event.data));
    });
    opened.addEventListener("close", () => {
      if (socket !== opened || over) return;
      changed(false);
      // Not all at the same moment: a class comes back to a server that has just started.
      timer = setTimeout(open, Math.min(LATEST, SOONEST * 2 ** tries) * (0.5 + Math.random()));
      tries += 1;
    });
  };
  const again = () => {
    socket?.close();
    socket = null;
    changed(false);
    open();
  };
  window.addEventListener("online", again);
  open();

  return {
    /** The room was found: should the way close, it is tried again soon. */
    settled() {
      tries = 0;
    },
    /** Not now: try again in a while. */
    retry: () => socket?.close(),
    send(message) {
      if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
    },
    stop() {
      over = true;
      clearTimeout(timer);
      window.removeEventListener("online", again);
      socket?.close();
    },
  };
}
