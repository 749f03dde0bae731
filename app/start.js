// Connects the page with its session: what Bokeh otherwise writes into the page as an inline script.
{
  // The stage asks a model for get, on and send_msg, and takes a message as {data}. Panel's gives its values as
  // properties, and a message bare: one with a field `data` could be taken for wrapped.
  const plainModel = (model) => ({
    get: (name) => model[name],
    on: (name, handler) => model.on(name, name === "msg:custom" ? (data) => handler({ data }) : handler),
    send_msg: (message) => model.send_msg(message),
  });

  // Panel loads modules with es-module-shims; every browser since 2018 can do it by itself.
  window.importShim = async (url) => {
    const module = await import(new URL(url, document.baseURI).href);
    if (url.startsWith("blob:")) return module; // Panel's own few lines
    return { default: { render: ({ model, el }) => module.default.render({ model: plainModel(model), el }) } };
  };
  window.importShim.addImportMap = () => {};

  const place = document.getElementById("leanscope");
  const { token, root } = JSON.parse(place.dataset.item);
  Bokeh.embed.embed_items({}, [{ token, roots: { [root]: place }, root_ids: [root], use_for_title: false }]);
}
