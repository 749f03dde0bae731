/** Questions to the server that have an answer: exact rows, a cell's arithmetic. Each is numbered, late answers dropped. */
import { plain } from "./track.js";

const KEPT = 400; // exact rows kept of one track

export function createAsks(send, player, cell) {
  let number = 0;
  let cellAsked = 0;
  const rows = new Map(); // number of the question -> {key, track}
  const sums = new Map(); // view -> {number of the newest question, what to do with its answer}

  return {
    /** Exact values of a row that travelled as codes; asked once, then kept with the track. */
    exact(track, row) {
      const key = `${track.id} ${row}`;
      if ([...rows.values()].some((asked) => asked.key === key)) return;
      number += 1;
      rows.set(number, { key, track });
      send({ type: "exact", request: number, track: track.id, row });
    },
    /** The arithmetic of a cell of view number `index`, as things stand at the player's step. */
    cell(index, at) {
      number += 1;
      cellAsked = number;
      cell.wait();
      send({ type: "cell", request: number, view: index, at, step: player.step });
    },
    /** What a calculator's formulas make of `values`; only the answer to the newest question counts. */
    calculate(index, values, answered) {
      number += 1;
      sums.set(index, { number, answered });
      send({ type: "calculate", request: number, view: index, values });
    },
    /** The card was closed: an answer still on its way shall not open it again. */
    forget() {
      cellAsked = 0;
    },
    answeredCell(message) {
      if (message.request === cellAsked) cell.show(message);
    },
    answeredSum(message) {
      const asked = sums.get(message.view);
      if (asked && asked.number === message.request) asked.answered(message);
    },
    answeredExact(message) {
      const asked = rows.get(message.request);
      rows.delete(message.request);
      if (!asked || !message.data) return;
      if (asked.track.exact.size > KEPT) asked.track.exact.clear();
      asked.track.exact.set(message.row, plain(message.data));
      player.redraw();
    },
  };
}
