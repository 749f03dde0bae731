// A stage for the server's tests: it keeps what arrives, and draws nothing.
export default {
  render({ model, el }) {
    const got = [];
    window.waves = { got, lesson: model.get("lesson"), course: model.get("course"), start: model.get("start"), places: model.get("places"), send: (m) => model.send_msg(m) };
    model.on("msg:custom", (event) => got.push(event.data));
    el.textContent = model.get("lesson")?.title ?? "index";
    model.send_msg({ type: "ready" });
  },
};
