/** The transport bar: play, back, forward, scrub, speed; what is computed so far, and how the run is doing. */
import { fill, make, say } from "./dom.js";
import { SPEEDS } from "./player.js";

export function createTransport(player, word, hooks) {
  const button = (label, sign, title, work, kind = "") =>
    make("button", { type: "button", class: `transport-button ${kind}`, "aria-label": label, title, on: { click: work } }, sign);
  const step = (count) => {
    hooks.taken();
    player.by(count);
  };
  const play = button("Play", "▶", "Play or pause (k)", () => hooks.toggle(), "primary");
  const back = button("One step back", "‹", "One step back (,)", () => step(-1));
  const forward = button("One step on", "›", "One step on (.)", () => step(1));
  const speed = button("Speed 1×", "1×", "Speed", () => {
    player.speed = SPEEDS[(SPEEDS.indexOf(player.speed) + 1) % SPEEDS.length];
    player.redraw();
  });
  const scrub = make("input", { type: "range", class: "scrub", min: 0, max: 0, value: 0, "aria-label": `${word} shown` });
  const ticks = make("div", { class: "ticks", "aria-hidden": "true" });
  const here = make("output", { class: "readout", "aria-live": "off" });
  const status = make("span", { class: "run-status", role: "status" });
  const stop = make("button", { type: "button", class: "stop", hidden: true, on: { click: () => hooks.stop() } }, "Stop");
  const element = make(
    "div",
    { class: "transport", role: "group", "aria-label": "Player" },
    make("div", { class: "transport-buttons" }, play, back, forward),
    make("div", { class: "scrub-box" }, scrub, ticks),
    make("div", { class: "transport-end" }, make("div", { class: "readouts" }, here, make("span", { class: "run-line" }, status, stop)), speed),
  );
  let marks = [];

  scrub.addEventListener("input", () => {
    leap(Number(scrub.value));
  });

  const leap = (to) => {
    hooks.taken();
    player.pause();
    player.go(to);
  };

  const reach = () => Math.max(1, player.total - 1);

  const draw = ({ step, position }) => {
    const playing = player.playing;
    say(play, playing ? "❚❚" : "▶");
    play.setAttribute("aria-label", playing ? "Pause" : "Play");
    play.classList.toggle("on", playing);
    say(speed, `${player.speed === 0.5 ? "½" : player.speed}×`);
    speed.setAttribute("aria-label", `Speed ${player.speed}×`);
    scrub.max = reach();
    scrub.value = String(step);
    element.style.setProperty("--played", `${(100 * position) / reach()}%`);
    element.style.setProperty("--ready", `${(100 * player.last) / reach()}%`);
    const mark = marks.find((m) => m.step === step);
    const text = player.steps ? `${word} ${step + 1} / ${player.total}` : `${word} …`;
    say(here, text);
    scrub.setAttribute("aria-valuetext", mark ? `${text}, ${mark.label}` : text);
    back.disabled = step <= 0;
    forward.disabled = step >= player.last;
    play.disabled = player.steps === 0;
  };
  player.listen(draw);

  return {
    element,
    draw,
    /** Red ticks at steps worth seeing. */
    mark(list) {
      marks = list;
      fill(
        ticks,
        marks
          .filter((m) => m.step >= 0 && m.step <= reach())
          .map((m) => make("span", { class: "tick", title: `${word} ${m.step + 1}: ${m.label}`, on: { click: () => leap(m.step) }, style: { left: `${(100 * m.step) / reach()}%` } })),
      );
    },
    /** What the run is doing, in words, and a Stop button while there is something to stop. */
    run(message) {
      say(status, wordsFor(message, word));
      element.dataset.state = message.state;
      stop.hidden = !["queued", "running"].includes(message.state);
    },
  };
}

function wordsFor({ state, place, steps, total, cached, seconds, message }, word) {
  const time = seconds ? ` in ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s` : "";
  if (state === "queued") return place > 1 ? `waiting, place ${place}` : "waiting for a free place";
  if (state === "running") return total ? `computing ${steps} of ${total}` : steps ? `computing ${word} ${steps}` : "starting …";
  if (state === "done") return cached ? "from the cache" : `computed${time}`;
  if (state === "cancelled") return "cancelled";
  if (state === "stopped") return "stopped; showing what there is";
  return message ? "failed" : state;
}
