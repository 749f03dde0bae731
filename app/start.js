// Connects the page with its session: what Bokeh otherwise writes into the page as an inline script.
{
  // Panel loads modules with es-module-shims; every browser since 2018 can do it by itself.
  window.importShim = (url) => import(new URL(url, document.baseURI).href);
  window.importShim.addImportMap = () => {};

  const place = document.getElementById("leanscope");
  const { token, root, plots = {} } = JSON.parse(place.dataset.item); // plots: model id -> id of the element for it
  const roots = { [root]: place };
  for (const [id, name] of Object.entries(plots)) roots[id] = document.getElementById(name);
  Bokeh.embed.embed_items({}, [{ token, roots, root_ids: Object.keys(roots), use_for_title: false }]);
}
