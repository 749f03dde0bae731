/** A beat's question, put to a room: votes, their number for the leader, and how they fell once that is revealed. */
import { BARE, nearestOf, predictWords } from "./cards.js";
import { fill, make, say } from "./dom.js";
import { rich } from "./text.js";

/**
 * `poll()` is {mine, counts, count, people}; `counts` is undefined until the leader reveals. `leads`: this is the
 * leader's page. `vote(i)` and `reveal()` tell the room; `answer()` is what was measured, once it is.
 */
export function pollCard(predict, { answer, poll, leads, vote, reveal }) {
  const words = predictWords(predict);
  const question = rich(predict.question, BARE);
  const buttons = predict.options.map((option, i) =>
    make("button", { type: "button", class: "guess", "aria-pressed": "false", on: { click: () => vote(i) } }, words.option(option)),
  );
  const choices = leads
    ? make("ul", { class: "guesses", "aria-label": "Answers" }, predict.options.map((option) => make("li", { class: "guess" }, words.option(option))))
    : make("div", { class: "guesses", role: "group", "aria-label": "Your vote" }, buttons);
  const bars = make("ul", { class: "poll-bars", "aria-label": "How the votes fell", hidden: true });
  const state = make("p", { class: "poll-state", role: "status" });
  const revealButton = make("button", { type: "button", class: "plain-button poll-reveal", on: { click: reveal } }, "Reveal");
  const verdict = make("p", { class: "verdict" });
  const element = make(
    "div",
    { class: "card guess-card poll-card" },
    make("div", { class: "card-kind" }, leads ? "The room’s guess" : "Your vote"),
    make("div", { class: "card-question" }, question.nodes),
    choices,
    bars,
    make("div", { class: "poll-foot" }, state, leads ? revealButton : null),
    verdict,
  );
  let drawn = "";

  const show = () => {
    const { mine, counts, count = 0, people = 0 } = poll();
    const measured = answer();
    const open = counts === undefined;
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", String(i === mine));
      button.disabled = !open;
    });
    choices.hidden = !open;
    bars.hidden = open;
    revealButton.hidden = !open;
    if (open) {
      if (leads) say(state, `${count} of ${people} ${count === 1 && people === 1 ? "has" : "have"} voted`);
      else say(state, mine === undefined ? "Nobody sees who chose what." : "Your vote is in. You may change it until the answer is revealed.");
      say(verdict, "");
      drawn = "";
      return;
    }
    const version = JSON.stringify([counts, mine, measured]);
    if (version === drawn) return;
    drawn = version;
    const all = counts.reduce((sum, n) => sum + n, 0);
    say(state, all === 0 ? "Nobody voted." : all === 1 ? "One vote." : `${all} votes.`);
    const nearest = measured === undefined ? undefined : predict.options.indexOf(nearestOf(predict.options, measured));
    fill(bars, predict.options.map((option, i) => bar(words.option(option), counts[i] || 0, all, { mine: i === mine, nearest: i === nearest })));
    if (measured === undefined) say(verdict, "Being measured …");
    else verdict.replaceChildren("Measured just now: ", make("strong", { class: "measured" }, words.value(measured)));
  };

  return {
    element,
    update: show,
    fill(facts) {
      question.fill(facts);
      show();
    },
  };
}

/** One answer: what it says, how many chose it, and whether it is yours or the nearest to what was measured. */
function bar(text, count, all, { mine, nearest }) {
  const share = all ? count / all : 0;
  const notes = [mine ? "yours" : "", nearest ? "nearest" : ""].filter(Boolean).join(", ");
  return make(
    "li",
    { class: `poll-bar${nearest ? " nearest" : ""}${mine ? " mine" : ""}` },
    make("span", { class: "poll-option" }, text),
    make("span", { class: "poll-track", "aria-hidden": "true" }, make("span", { class: "poll-fill", style: { width: `${100 * share}%` } })),
    make("span", { class: "poll-count" }, String(count), make("span", { class: "visually-hidden" }, count === 1 ? " vote" : " votes")),
    make("span", { class: "poll-note" }, notes),
  );
}
