/** Light, dark or as the system has it; and our own fonts, which a shadow root can only have from the document. */

/** For canvases, which know no CSS variables. */
export const FONTS = { text: '"Inter", system-ui, sans-serif', mono: '"JetBrains Mono", ui-monospace, monospace' };

const KEY = "leanscope-theme";
const ORDER = ["auto", "light", "dark"];

const FACES = [
  ["Inter", "inter.woff2", { weight: "100 900" }],
  ["Source Serif 4", "source-serif-4.woff2", { weight: "200 900" }],
  ["Source Serif 4", "source-serif-4-italic.woff2", { weight: "200 900", style: "italic" }],
  ["JetBrains Mono", "jetbrains-mono.woff2", { weight: "100 800" }],
];

/** `root` gets data-theme "light" or "dark"; `changed` is called whenever that may alter a picture. */
export function createTheme(root, changed) {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let choice = remembered();

  const apply = () => {
    root.dataset.theme = choice === "auto" ? (system.matches ? "dark" : "light") : choice;
    root.style.colorScheme = root.dataset.theme;
    changed();
  };
  system.addEventListener("change", apply);
  apply();

  return {
    get choice() {
      return choice;
    },
    cycle() {
      choice = ORDER[(ORDER.indexOf(choice) + 1) % ORDER.length];
      try {
        localStorage.setItem(KEY, choice);
      } catch {
        // A browser that keeps nothing still shows the theme for this visit.
      }
      apply();
    },
    stop: () => system.removeEventListener("change", apply),
  };
}

function remembered() {
  try {
    const kept = localStorage.getItem(KEY);
    return ORDER.includes(kept) ? kept : "auto";
  } catch {
    return "auto";
  }
}

/** Load our fonts from `folder`; without one, or when a file is missing, the system's fonts stay. `into`: the window. */
export function loadFonts(folder, loaded, into = window) {
  if (!folder || typeof FontFace === "undefined") return;
  const base = folder.endsWith("/") ? folder : `${folder}/`;
  for (const [family, file, options] of FACES) {
    const face = new into.FontFace(family, `url("${base}${file}")`, { display: "swap", ...options });
    into.document.fonts.add(face);
    face.load().then(loaded, () => into.document.fonts.delete(face));
  }
}
