/**
 * The page: `render({model, el})` for Panel, Jupyter and static files alike. Of the model it uses get, send_msg and
 * on("msg:custom"); messages are described in CONTRIBUTING.md.
 */
import { lessonPage } from "./lesson.js";
import { make } from "./dom.js";
import { explorePage } from "./explore.js";
import { homePage } from "./home.js";
import { plainModel } from "./model.js";
import { STYLES } from "./styles.js";
import { createTheme, loadFonts } from "./theme.js";

/** Styles go where the page is: into the shadow root that Panel makes, or into the document. */
function dress(el) {
  const root = el.getRootNode();
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(STYLES);
  root.adoptedStyleSheets = [...root.adoptedStyleSheets, sheet];
}

function render({ model: given, el }) {
  const model = plainModel(given);
  const places = model.get("places") || {};
  const root = make("div", { class: places.embedded ? "leanscope embedded" : "leanscope" });
  dress(el);
  el.append(root);
  let page = null;
  const theme = createTheme(root, () => {
    if (!places.embedded) document.documentElement.style.background = getComputedStyle(root).getPropertyValue("--paper");
    page?.themed();
  });
  if (!places.embedded) document.body.style.margin = "0";
  const open = model.get("explore")?.slug ? explorePage : model.get("lesson")?.slug ? lessonPage : homePage;
  page = open({ root, model, places, theme });
  loadFonts(places.fonts, () => page.themed());
  model.on("remove", () => {
    theme.stop();
    page.stop();
  });
}

export default { render };
