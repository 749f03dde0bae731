/** The model as the stage asks for it: get, on and send_msg, a message as {data}. */

/**
 * Panel's model gives its values as properties, and a message bare: one with a field `data` could be taken for wrapped.
 */
export function plainModel(model) {
  if (typeof model.get === "function") return model;
  return {
    get: (name) => model[name],
    on: (name, handler) => model.on(name, name === "msg:custom" ? (data) => handler({ data }) : handler),
    send_msg: (message) => model.send_msg(message),
  };
}
