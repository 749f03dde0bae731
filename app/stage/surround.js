/** What stands around and behind a matrix: the ground that it will fill, its name, the names of its rows. */

const PACES = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100]; // every so many rows one is named

export function surround(scene, box) {
  const { pen, matrix, spec, context, ground } = scene;
  const { role } = context.colours;
  const [w, h] = [box.cw * matrix.columns, box.ch * matrix.rows];
  if (!spec.gaps) {
    pen.fillStyle = ground;
    pen.fillRect(box.x, box.y, w, h);
    pen.strokeStyle = role("line");
    pen.lineWidth = 1;
    pen.strokeRect(box.x - 0.5, box.y - 0.5, w + 1, h + 1);
  }
  if (context.bare) return;
  pen.fillStyle = role("muted");
  pen.font = `11px ${context.fonts.text}`;
  pen.textBaseline = "alphabetic";
  pen.textAlign = "left";
  if (!box.large) {
    pen.fillText(cut(pen, `${spec.facet} ${box.facet}`, Math.max(24, w)), box.x, box.y - 4);
    return;
  }
  const title = matrix.facets > 1 ? `${spec.facet} ${box.facet} · ` : "";
  pen.fillText(`${title}${spec.columns} →`, box.x, box.y - 6);
  pen.save();
  pen.translate(9, box.y);
  pen.rotate(-Math.PI / 2);
  pen.textAlign = "right";
  pen.fillText(`← ${spec.rows}`, 0, 0);
  pen.restore();
  nameRows(scene, box);
}

function nameRows({ pen, matrix, spec, context, label }, box) {
  pen.font = `10px ${context.fonts.mono}`;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const least = Math.ceil(13 / box.ch);
  const pace = PACES.find((n) => n >= least) || least;
  for (let i = 0; i < matrix.rows; i += pace) {
    const name = box.x > 40 ? label(spec.rows, i) : ""; // a word needs room; the tip has it where there is none
    pen.fillText(name ? cut(pen, name, box.x - 20) : String(i), box.x - 5, box.y + (i + 0.5) * box.ch);
  }
}

/** Text that fits into `room` pixels, with an ellipsis where it was cut. */
function cut(pen, text, room) {
  if (pen.measureText(text).width <= room) return text;
  let end = text.length;
  while (end > 1 && pen.measureText(`${text.slice(0, end)}…`).width > room) end -= 1;
  return `${text.slice(0, end)}…`;
}
