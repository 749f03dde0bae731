/** The two cards that a beat may carry: a guess, scored against what was measured, and a thing to do. */
import { make, say } from "./dom.js";
import { format, rich } from "./text.js";

/** A card's text has neither glossary nor highlights. */
export const BARE = { term: (shown) => make("span", {}, shown), light: (nodes) => make("span", {}, nodes) };

/** `guesses` remembers what was guessed, by beat, so that going back does not ask again. */
export function guessCard(predict, { answer, guesses, index }) {
  const { option: optionText, value: shown } = predictWords(predict);
  const buttons = predict.options.map((option) =>
    make("button", { type: "button", class: "guess", "aria-pressed": "false", on: { click: () => choose(option) } }, optionText(option)),
  );
  const verdict = make("p", { class: "verdict", role: "status" });
  const question = rich(predict.question, BARE);
  const element = make(
    "div",
    { class: "card guess-card" },
    make("div", { class: "card-kind" }, "Your guess"),
    make("div", { class: "card-question" }, question.nodes),
    make("div", { class: "guesses", role: "group", "aria-label": "Your guess" }, buttons),
    verdict,
  );

  const choose = (option) => {
    guesses.set(index, option);
    show();
  };

  const show = () => {
    const guess = guesses.get(index);
    const measured = answer();
    predict.options.forEach((option, i) => {
      buttons[i].setAttribute("aria-pressed", String(option === guess));
      buttons[i].classList.toggle("nearest", guess !== undefined && measured !== undefined && option === nearestOf(predict.options, measured));
    });
    if (guess === undefined) return say(verdict, "");
    if (measured === undefined) return say(verdict, "Being measured …");
    const near = nearestOf(predict.options, measured) === guess;
    return verdict.replaceChildren(
      "Measured just now: ",
      make("strong", { class: "measured" }, shown(measured)),
      make("span", { class: near ? "hit" : "miss" }, near ? " ✓ nearest of all" : ` · nearest was ${optionText(nearestOf(predict.options, measured))}`),
    );
  };

  return {
    element,
    fill(facts) {
      question.fill(facts);
      show();
    },
  };
}

/** How a question's options and its measured answer read. */
export function predictWords(predict) {
  const whole = predict.options.every((option) => Number.isInteger(option) && option < 1e9) && !predict.format.includes("%");
  return {
    option: (option) => format(option, whole ? ",d" : predict.format),
    value: (value) => `${format(value, predict.format)}${predict.unit ? ` ${predict.unit}` : ""}`,
  };
}

/** The option nearest to the measured value; in proportion when all are positive, as people judge "twice as much". */
export function nearestOf(options, value) {
  const positive = value > 0 && options.every((option) => option > 0);
  const far = (option) => Math.abs(positive ? Math.log(option / value) : option - value);
  return options.reduce((best, option) => (far(option) < far(best) ? option : best));
}

/** A thing to do before going on (or not: Next stays open to everyone). */
export function doCard(task, finished) {
  const sign = make("span", { class: "do-sign", "aria-hidden": "true" });
  const state = make("span", { class: "visually-hidden", role: "status" });
  const text = rich(task.text, BARE);
  const element = make("div", { class: "card do-card" }, sign, make("div", {}, make("div", { class: "card-kind" }, "Try it"), make("div", { class: "card-question" }, text.nodes), state));
  const finish = () => {
    element.classList.add("finished");
    say(sign, "✓");
    say(state, "Done");
  };
  if (finished) finish();
  return { element, fill: text.fill, finish };
}
