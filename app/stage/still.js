/**
 * In place of a server, for pages that are files (`leanscope export`): answers what the page asks from the pieces of
 * its recordings, and says where the engine is to be had for what was not recorded.
 */
import { make } from "./dom.js";
import { createFinder } from "./finder.js";
import { cellOf, exactRow, rowsFrom, tensorAt, wholeOf } from "./kept.js";
import { npzOf } from "./npz.js";
import { createShelf } from "./shelf.js";
import { placeOf, tokenOf } from "./token.js";

export async function playFiles(render) {
  const about = JSON.parse(document.getElementById("leanscope-files").textContent);
  const host = document.getElementById("leanscope");
  try {
    const shelf = createShelf(about);
    const page = await shelf.get("page");
    const places = { fonts: about.fonts ? `${about.up}fonts/` : "", home: `${about.up}index.html` };
    const query = new URLSearchParams(location.search);
    const model = page.course ? modelOf({ course: page.course, places, start: {} }, {}).model : lessonModel(page, shelf, places, query);
    const inner = host.appendChild(make("div")); // as Panel has it: the page lives in a shadow root inside
    render({ model, el: inner.attachShadow({ mode: "open" }).appendChild(make("div")) });
  } catch (error) {
    host.append(make("main", { class: "plain" }, make("h1", {}, "This page can’t be shown."), make("p", {}, error.message)));
  }
}

/** What Panel's model would be: properties, and handlers by the type of message. */
function modelOf(properties, handlers) {
  const listeners = [];
  const tell = (message) => setTimeout(() => listeners.forEach((listener) => listener({ data: message })));
  const model = {
    get: (name) => properties[name],
    on: (event, listener) => event === "msg:custom" && listeners.push(listener),
    send_msg: (message) => handlers[message.type]?.(message),
  };
  return { model, tell };
}

function lessonModel(page, shelf, places, query) {
  const { lesson, snapshots, engine } = page;
  const finder = createFinder(lesson, snapshots);
  const defaults = Object.fromEntries(lesson.knobs.map((spec) => [spec.name, spec.default]));
  const start = startOf(page, finder, defaults, query);
  let values = start.knobs;
  let at = finder.exactly(values); // number of the snapshot on the stage
  let scene = "";
  let place = { beat: start.beat, step: start.step || 0 };
  let turns = 0; // pictures asked for: only the newest counts
  const sent = { run: "", tracks: new Set() };

  const token = (knobs) => tokenOf({ knobs, ...place }, defaults);
  const address = engine.address && `${engine.address.replace(/\/+$/, "")}/lesson/${lesson.slug}`;
  let asked = values; // what was turned last, recorded or not
  const where = address ? `For that, open ${address}` : "For that, get Leanscope and start its engine with make serve.";
  const notice = (text, more = {}) => tell({ type: "notice", level: "info", text, ...more });
  const failed = (error) => notice(error.message, { level: "warning" });
  const link = () => {
    const asks = [query.get("present") && "present=1", token(values) && `s=${token(values)}`].filter(Boolean);
    tell({ type: "link", href: `${lesson.slug}.html${asks.length ? "?" : ""}${asks.join("&")}` });
  };

  const show = async () => {
    turns += 1;
    const turn = turns;
    const snapshot = snapshots[at];
    const { picture, ids } = finder.picture(snapshot, scene, values);
    const run = picture.run;
    const pieces = new Map();
    for (const home of new Set(ids.map((id) => homeOf(snapshot, id)[0]))) pieces.set(home, await shelf.get(home));
    if (turn !== turns) return;
    if (sent.run !== run) {
      sent.run = run;
      sent.tracks.clear();
    }
    tell(picture);
    for (const id of ids.filter((one) => !sent.tracks.has(one))) {
      sent.tracks.add(id);
      const [home, index] = homeOf(snapshot, id);
      const { rows, picks } = snapshot.tracks[id];
      const here = pieces.get(home)[index];
      (rows ? here : [rowsFrom(here, picks)]).forEach((message) => tell({ type: "rows", run, track: id, ...message }));
    }
    [...snapshot.texts, snapshot.run, snapshot.facts].filter(Boolean).forEach(tell);
    link();
  };
  const redraw = () => show().catch(failed);

  /** What the person turned is shown, or put back, with a sentence at the knob. */
  const turned = (wanted) => {
    asked = wanted;
    const { found, also, missing } = finder.find(values, wanted);
    if (missing) {
      recorded.put?.(values);
      notice(`${missing.label} ${missing.text} is not recorded on this page. ${where}`, { knob: missing.name });
      return;
    }
    at = found;
    values = { ...wanted, ...also };
    if (Object.keys(also).length) {
      recorded.put?.(values);
      notice(`“${snapshots[at].name}” was recorded with ${finder.words(also)}, so that was set too.`);
    }
    redraw();
  };

  /** Everything that the scenes of all snapshots open with, for whoever presents and may lose the network. */
  const ahead = async () => {
    for (const snapshot of snapshots) {
      for (const one of snapshot.scenes) {
        for (const id of finder.picture(snapshot, one.scene, values).ids) await shelf.get(homeOf(snapshot, id)[0]);
      }
    }
    tell({ type: "ahead", ahead: 0, kept: snapshots.length, of: snapshots.length, left: [] });
  };

  const exact = async ({ request, track: id, row }) => {
    const track = snapshots[at].tracks[id];
    const home = track && snapshots[at].tensors.at[track.key];
    if (!home) return;
    const data = exactRow((await shelf.get(home[0]))[home[1]], row, track.picks);
    if (data) tell({ type: "exact", request, track: id, row, data });
  };

  const cell = async ({ request, view, at: position, step }) => {
    const snapshot = snapshots[at];
    const name = finder.sceneOf(snapshot, scene).scene;
    const known = snapshot.cells[`${name}/${view}`];
    const home = known && known.pieces[known.looks.map((look) => finder.text(snapshot, look, values)).join("|")];
    const found = home ? cellOf(await shelf.get(home), position, step) : {};
    const answer = { type: "cell", request, view };
    if (found.lines) return tell({ ...answer, ...found });
    const some = found.nearest ? ` It has ${found.count.toLocaleString("en-US")} others; the nearest is ${found.nearest}.` : "";
    return tell({ ...answer, error: `The arithmetic of this cell is not on this page.${some} ${where}` });
  };

  const tensor = async ({ key, step }) => {
    const home = snapshots[at].tensors.at[key];
    if (!home) return notice(`The values of this tensor are not on this page. ${where}`);
    const message = tensorAt((await shelf.get(home[0]))[home[1]], key, step);
    return message ? tell(message) : notice("That tensor has no values yet at this step.");
  };

  /** The claims, a notebook, or all tensors that are here. */
  const download = async ({ what }) => {
    const snapshot = snapshots[at];
    if (snapshot.files[what]) return tell(snapshot.files[what]);
    if (what !== "npz") return notice(`This file is made by the engine. ${where}`);
    const tensors = [];
    for (const [key, [home, index]] of Object.entries(snapshot.tensors.at)) tensors.push([key, wholeOf((await shelf.get(home))[index])]);
    const left = snapshot.tensors.list.tensors.length - tensors.length;
    if (left > 0) notice(`${left} of ${left + tensors.length} tensors are not on this page, nor in the file. ${where}`);
    return tell({ type: "file", name: `leanscope-${lesson.slug}.npz`, mime: "application/octet-stream", data: npzOf(tensors) });
  };

  const calculate = ({ request, view, values: typed }) => {
    const presets = finder.sceneOf(snapshots[at], scene).calculators[view] || [];
    const same = presets.find(([asked]) => Object.keys(asked).every((name) => asked[name] === typed[name]));
    const error = `This page has the sums of the models in its list. Other numbers take the engine. ${where}`;
    tell(same ? { ...same[1], request, view } : { type: "calculated", request, view, error });
  };

  /** The address of the engine, at what was asked of it. */
  const live = () => (token(asked) ? `${address}?s=${token(asked)}` : address);
  const recorded = { version: engine.version, where, live: address ? live : null, snapshots: snapshots.map((snapshot) => snapshot.values) };
  const { model, tell } = modelOf(
    { lesson: { ...lesson, recorded }, start, places },
    {
      ready: redraw,
      ping: () => tell({ type: "pong" }),
      knobs: (message) => turned(message.values),
      scene(message) {
        scene = message.scene;
        redraw();
      },
      place(message) {
        place = { beat: message.beat, step: message.step };
        link();
      },
      ahead: () => ahead().catch(failed),
      exact: (message) => exact(message).catch(failed),
      cell: (message) => cell(message).catch((error) => tell({ type: "cell", request: message.request, view: message.view, error: error.message })),
      calculate,
      code: () => shelf.get("code").then((messages) => messages.forEach(tell), failed),
      tensors: () => tell(snapshots[at].tensors.list),
      tensor: (message) => tensor(message).catch(failed),
      download: (message) => download(message).catch(failed),
    },
  );
  return model;
}

/** Where a track's rows are: packed as they travel, or as they were recorded. */
function homeOf(snapshot, id) {
  const { rows, key } = snapshot.tracks[id];
  return rows || snapshot.tensors.at[key];
}

/** Where the page begins: where its link says, as far as that was recorded. */
function startOf(page, finder, defaults, query) {
  const start = { ...page.start, present: query.get("present") === "1" };
  const token = query.get("s");
  if (!token) return start;
  const place = placeOf(token);
  const wrong = (text) => ({ ...start, notices: [...start.notices, `The link could not be followed: ${text} Everything is at its defaults.`] });
  if (!place) return wrong("it is damaged.");
  const wanted = { ...defaults, ...place.knobs };
  const { found, also, missing } = finder.find(wanted, wanted);
  if (missing || found < 0) return wrong("its setting is not recorded here.");
  return { ...start, knobs: { ...wanted, ...also }, beat: place.beat, step: place.step };
}
