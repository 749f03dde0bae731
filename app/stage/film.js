/** The scene as a file: a picture of it as it stands, or an animation of chosen steps, drawn anew from the recording. */
import { createGif, paletteOf } from "./gif.js";
import { finely } from "./glass.js";
import { svgOf } from "./paper.js";

const FINE = 2; // a picture's pixels to one of the page's
const FILES = { Inter: "inter", "Source Serif 4": "source-serif-4", "JetBrains Mono": "jetbrains-mono" };
const LAST = 100; // hundredths of a second that the last frame stands at least

/**
 * `stage`: element() of the scene, draw(step), resize(), captions(step) [left, right], colours() {ground, ink}.
 * `folder`: where the fonts are; a page opened from disk may not read them, and is drawn with the system's.
 */
export function createCamera(stage, folder) {
  let fonts = null;

  const embedded = async () => {
    if (fonts === null) {
      const faces = await Promise.all(Object.entries(FILES).map(([family, file]) => face(family, folder && `${folder}${file}.woff2`)));
      fonts = faces.join("");
    }
    return fonts;
  };

  /** The scene at `step` as SVG text. What is for the eye alone, as the spotlight, is left out. */
  const drawn = (step, css) => {
    const element = stage.element();
    const spot = element.querySelector(".spot");
    element.classList.add("taken");
    spot?.classList.remove("spot");
    try {
      stage.draw(step);
      return new XMLSerializer().serializeToString(svgOf(element, { caption: stage.captions(step), fonts: css, ...stage.colours() }));
    } finally {
      spot?.classList.add("spot");
      element.classList.remove("taken");
    }
  };

  /** Do `work` with canvases so many times finer than the page's pixels; then the page is as it was, at step `back()`. */
  const finer = async (by, back, work) => {
    const css = await embedded();
    finely(by);
    stage.resize();
    try {
      return await work(css);
    } finally {
      finely(0);
      stage.resize();
      stage.draw(back());
    }
  };

  return {
    svg: (step) => finer(FINE, () => step, (css) => `<?xml version="1.0" encoding="UTF-8"?>\n${drawn(step, css)}\n`),
    async png(step) {
      const text = await finer(FINE, () => step, (css) => drawn(step, css));
      const canvas = await rendered(text, FINE);
      const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
      return new Uint8Array(await blob.arrayBuffer());
    },
    /** The steps as an animation. `progress(done, of)` returns false to give up: then there is no file, but null. */
    gif: (steps, rate, progress, back) =>
      finer(1, back, async (css) => {
        const shot = async (step, size) => pixelsOf(await rendered(drawn(step, css), 1, size, stage.colours().ground));
        const some = [];
        for (const at of [0, steps.length >> 1, steps.length - 1]) some.push(await shot(steps[at]));
        const size = { width: Math.max(...some.map((one) => one.width)), height: Math.max(...some.map((one) => one.height)) };
        const gif = createGif(size.width, size.height, paletteOf(some.map((one) => one.data)));
        for (const [i, step] of steps.entries()) {
          if (progress(i, steps.length) === false) return null;
          gif.add((await shot(step, size)).data, i === steps.length - 1 ? Math.max(LAST, 100 / rate) : 100 / rate);
        }
        return gif.bytes();
      }),
  };
}

/** A font as CSS that brings its file along; "" where the file can't be read. */
async function face(family, address) {
  if (!address) return "";
  try {
    const reply = await fetch(address);
    if (!reply.ok) return "";
    const bytes = new Uint8Array(await reply.arrayBuffer());
    let text = "";
    for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
    return `@font-face{font-family:"${family}";font-weight:100 900;src:url(data:font/woff2;base64,${btoa(text)})}`;
  } catch {
    return "";
  }
}

/** SVG text as a canvas; of that `size`, where one is given, and `ground` where the picture is smaller. */
async function rendered(text, by, size, ground) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  const [width, height] = [Math.round(image.naturalWidth * by), Math.round(image.naturalHeight * by)];
  Object.assign(canvas, size || { width, height });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.imageSmoothingEnabled = false;
  if (ground) {
    pen.fillStyle = ground;
    pen.fillRect(0, 0, canvas.width, canvas.height);
  }
  pen.drawImage(image, 0, 0, width, height);
  return canvas;
}

function pixelsOf(canvas) {
  return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
}
