/** What a room shows: a line under the header, the invitation to put on the wall, and the door on the index. */
import { fill, make, say } from "./dom.js";
import { recallRoom } from "./line.js";

/** A code is read aloud and typed: in two halves. */
export function spell(code) {
  return `${code.slice(0, 3)} ${code.slice(3)}`;
}

/** `hooks`: follow, leave, end. */
export function createRoomBar(hooks) {
  const code = make("strong", { class: "room-code" });
  const state = make("span", { class: "room-state", role: "status" });
  const people = make("span", { class: "room-people" });
  const button = (text, work, kind = "") => make("button", { type: "button", class: `plain-button ${kind}`, hidden: true, on: { click: work } }, text);
  const follow = button("Follow", hooks.follow, "room-follow");
  const show = button("Show the code", () => invitation.open());
  const leave = button("Leave", hooks.leave);
  const end = button("End the room", () => {
    if (end.dataset.sure) hooks.end();
    else sure(true);
  });
  let unsure = 0;
  /** Ending is for all: it is asked for twice. */
  const sure = (asked) => {
    clearTimeout(unsure);
    if (asked) end.dataset.sure = "1";
    else delete end.dataset.sure;
    say(end, asked ? "End it for everybody" : "End the room");
    if (asked) unsure = setTimeout(() => sure(false), 4000);
  };
  const invitation = createInvitation();
  const element = make(
    "section",
    { class: "room-bar", "aria-label": "Room", hidden: true },
    make("span", { class: "room-name" }, "Room ", code),
    state,
    people,
    make("span", { class: "room-buttons" }, follow, show, leave, end),
    invitation.element,
  );

  return {
    element,
    invite: invitation.open,
    /** `room` is {code, leads, own, people, link, qr, there}, or null. */
    draw(room) {
      element.hidden = !room;
      if (!room) {
        invitation.close();
        sure(false);
        return;
      }
      say(code, spell(room.code));
      say(state, wordsOf(room));
      const count = room.people === undefined ? "" : room.people === 1 ? "1 student" : `${room.people} students`;
      say(people, count);
      element.dataset.state = !room.there ? "away" : room.leads ? "leads" : room.own ? "own" : "follows";
      follow.hidden = room.leads || !room.own;
      show.hidden = end.hidden = !room.leads;
      leave.hidden = room.leads;
      invitation.draw(room, count);
    },
  };
}

function wordsOf({ there, leads, own }) {
  if (!there) return "Looking for the room …";
  if (leads) return "You lead.";
  return own ? "You are on your own." : "You follow the leader.";
}

/** Code, link and QR code, large. */
function createInvitation() {
  const code = make("p", { class: "invite-code" });
  const link = make("a", { class: "invite-link" });
  const picture = make("div", {});
  let pictured = "";
  const people = make("p", { class: "invite-people", role: "status" });
  const copy = make("button", { type: "button", class: "plain-button" }, "Copy the link");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(link.href);
      say(copy, "Copied");
    } catch {
      say(copy, "Select it above, and copy");
    }
    setTimeout(() => say(copy, "Copy the link"), 2000);
  });
  const element = make("dialog", { class: "invite", "aria-label": "How to join" });
  const close = () => element.open && element.close();
  element.append(
    make("h2", {}, "Join with this code"),
    code,
    picture,
    make("p", { class: "invite-or" }, "or open ", link),
    people,
    make("div", { class: "invite-buttons" }, copy, make("button", { type: "button", class: "plain-button", on: { click: close } }, "Close")),
  );
  element.addEventListener("keydown", (event) => event.stopPropagation()); // beats shall not move behind it
  element.addEventListener("click", (event) => event.target === element && close());

  return {
    element,
    close,
    open: () => element.isConnected && !element.open && element.showModal(),
    draw(room, count) {
      say(code, spell(room.code));
      say(people, count && `${count} in the room`);
      if (room.link && link.getAttribute("href") !== room.link) {
        link.href = room.link;
        say(link, room.link.replace(/^https?:\/\//, ""));
      }
      if (room.qr === pictured) return;
      pictured = room.qr;
      fill(picture, pictured ? make("img", { class: "invite-qr", src: pictured, alt: "The link as a QR code", width: 280, height: 280 }) : null);
    },
  };
}

/** On the index: where a code is typed. `rooms` is where rooms are; null where there are none. */
export function roomDoor(rooms) {
  if (!rooms) return null;
  const known = recallRoom();
  const input = make("input", { type: "text", id: "room-code", class: "door-input", autocomplete: "off", autocapitalize: "characters", spellcheck: "false", maxlength: 12, placeholder: "CDF 347" });
  const go = (event) => {
    event.preventDefault();
    const code = input.value.replace(/[^a-z0-9]/gi, "");
    if (code) location.assign(`${rooms}/${encodeURIComponent(code)}`);
    else input.focus();
  };
  return make(
    "form",
    { class: "door", on: { submit: go } },
    make("label", { for: "room-code" }, "Code of a room"),
    input,
    make("button", { type: "submit", class: "plain-button" }, "Join"),
    known ? make("a", { class: "door-back", href: `${rooms}/${encodeURIComponent(known.code)}` }, `Back to room ${spell(known.code)}`) : null,
  );
}
