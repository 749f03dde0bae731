/** From a matrix's sheet of pixels to the screen: copied where cells touch, drawn one by one where they stand apart. */
import { css } from "./colours.js";
import { ratio } from "./glass.js";

/** Copy lines from..to of a facet. Unless cells are whole pixels, all of it: seams would show between strips. */
export function blit({ pen, matrix, ground }, box, from, to, lines) {
  const uneven = !isWhole(box.cw) || !isWhole(box.ch);
  const across = matrix.mode === "across";
  const [a, b] = uneven ? [0, across ? matrix.columns : matrix.rows] : [from, to];
  const done = Math.max(a, Math.min(b, lines));
  const strip = (p, q) => (across ? [p, 0, q - p, matrix.rows] : [0, p, matrix.columns, q - p]);
  const [x, y, w, h] = strip(a, b);
  pen.fillStyle = ground;
  pen.fillRect(box.x + x * box.cw, box.y + y * box.ch, w * box.cw, h * box.ch);
  if (done === a) return;
  const [sx, sy, sw, sh] = strip(a, done);
  const place = [box.x + sx * box.cw, box.y + sy * box.ch, sw * box.cw, sh * box.ch];
  pen.imageSmoothingEnabled = box.cw < 1 || box.ch < 1;
  pen.imageSmoothingQuality = "low"; // the better ones look past the edge, into the neighbouring facet
  pen.drawImage(matrix.sheet, box.facet * matrix.columns + sx, sy, sw, sh, ...place);
}

/** Few, large cells, drawn apart with round corners, small where `isOut`; the one that the knobs point at is outlined. */
export function tiles({ pen, matrix, spec, context }, box, lines, isOut) {
  const inset = Math.min(2, box.cw * 0.12);
  const [w, h] = [box.cw - inset, box.ch - inset];
  pen.clearRect(box.x - 1, box.y - 1, box.cw * matrix.columns + 2, box.ch * matrix.rows + 2);
  const rows = matrix.mode === "down" ? lines : matrix.rows;
  for (let i = 0; i < rows; i += 1) {
    for (let j = 0; j < matrix.columns; j += 1) {
      const pixel = matrix.pixels[i * matrix.sheet.width + box.facet * matrix.columns + j];
      if (!pixel) continue;
      pen.fillStyle = css(pixel);
      pen.beginPath();
      const size = isOut && isOut(i, j) ? 0.45 : 1;
      const [x, y] = [box.x + j * box.cw + (w * (1 - size)) / 2, box.y + i * box.ch + (h * (1 - size)) / 2];
      pen.roundRect(x, y, w * size, h * size, Math.min(2.5, box.cw / 5));
      pen.fill();
    }
  }
  const [row, column] = [context.knobs[spec.rows], context.knobs[spec.columns]];
  if (row === undefined || column === undefined || context.bare) return;
  pen.strokeStyle = context.colours.role("ink");
  pen.lineWidth = 1.75;
  pen.strokeRect(box.x + column * box.cw - 0.5, box.y + row * box.ch - 0.5, w + 1, h + 1);
}

function isWhole(size) {
  const device = size * ratio();
  return Math.abs(device - Math.round(device)) < 1e-6;
}
