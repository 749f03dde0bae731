// A stage for the server's tests: it keeps what arrives, and draws nothing.
export default {
  render({ model, el }) {
    const got = [];
    window.waves = { got, lesson: model.lesson, course: model.course, start: model.start, places: model.places, send: (m) => model.send_msg(m) };
    model.on("msg:custom", (message) => got.push(message));
    el.textContent = model.lesson?.title ?? "index";
    model.send_msg({ type: "ready" });
  },
};
