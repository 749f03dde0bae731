// Connects the page with its session: what Bokeh otherwise writes into the page as an inline script.
{
  // Panel loads modules with es-module-shims; every browser since 2018 can do it by itself.
  window.importShim = (url) => import(new URL(url, document.baseURI).href);
  window.importShim.addImportMap = () => {};

  const place = document.getElementById("leanscope");
  const { token, root } = JSON.parse(place.dataset.item);
  Bokeh.embed.embed_items({}, [{ token, roots: { [root]: place }, root_ids: [root], use_for_title: false }]);
}
