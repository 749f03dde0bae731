/**
 * In place of a server: plays saved messages to the page. `saved` is {course | lesson, start, places, messages,
 * answers}; arrays in messages stand as {"array": "uint8", "base64": "…"}. `answers` maps a question's key (see
 * `questionOf`) to the saved reply. A static page has no engine, and says so when a knob is turned.
 */

const KINDS = { uint8: Uint8Array, int32: Int32Array, float32: Float32Array };

function revive(value) {
  if (Array.isArray(value)) return value.map(revive);
  if (!value || typeof value !== "object") return value;
  if (!("base64" in value)) return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, revive(inner)]));
  const bytes = Uint8Array.from(atob(value.base64), (character) => character.charCodeAt(0));
  return new KINDS[value.array](bytes.buffer);
}

const questionOf = ({ type, view, at, track, row, key, scene }) => JSON.stringify([type, view ?? scene ?? track ?? key ?? null, at ?? row ?? null]);

export function standin(saved) {
  const handlers = [];
  const sent = [];
  const reply = (message) => setTimeout(() => handlers.forEach((handler) => handler({ data: revive(message) })));
  const answers = {
    ready: () => saved.messages.forEach(reply),
    ping: () => reply({ type: "pong" }),
    knobs: () => reply({ type: "notice", level: "info", text: "This page is a recording: its knobs do not run the engine." }),
  };
  return {
    sent,
    get: (name) => revive(saved[name]),
    on: (event, handler) => event === "msg:custom" && handlers.push(handler),
    play: reply,
    send_msg(message) {
      sent.push(message);
      const kept = saved.answers?.[questionOf(message)];
      if (kept) [kept].flat().forEach((one) => reply("request" in message ? { ...one, request: message.request } : one));
      else answers[message.type]?.(message);
    },
  };
}
