/** A number line: values above, the levels that stand for them below, and the fall from one to the other. */
import { css } from "./colours.js";
import { format } from "./text.js";

const LINE_DOT = 4;
const LINE_TOP = 26; // the values' own line, from the top of the picture
const LINE_FOOT = 36; // room for codes and their values under the axis
const LINE_MINUTE = 2.2; // the radius of a dot where there are many

/** How high a number line is when there are so many of them. */
export function lineHeight(count) {
  return count <= 1 ? 168 : count === 2 ? 128 : 104;
}

/** Levels on their way from where they were: a step's worth of motion. */
export function fall(from, to, t) {
  if (!from || from.length !== to.length || t >= 1) return to;
  const eased = 1 - (1 - t) ** 3;
  return to.map((level, n) => from[n] + (level - from[n]) * eased);
}

/**
 * `about`: low and high of the axis, levels, items {n, value, level, done}, the number now at work, the one pointed at,
 * landed {from, t} while items from a number on are still in the air, names of the codes, scale, zero, title.
 */
export function numberLine(pen, box, context, about) {
  const { role } = context.colours;
  const ramp = context.colours.scale("recomputed");
  const x = (value) => box.x + ((value - about.low) / (about.high - about.low || 1)) * box.width;
  const axis = box.y + box.height - LINE_FOOT;
  const top = box.y + LINE_TOP;
  const { levels, items } = about;
  const hue = (n) => css(ramp[Math.round(60 + (150 * n) / Math.max(1, levels.length - 1))]);
  const many = items.length > 120;
  const radius = many ? LINE_MINUTE : LINE_DOT;

  if (about.title) lineWords(pen, context, about.title, box.x, box.y + 10, role("muted"), "left", 12);
  lineRule(pen, box.x, axis, box.x + box.width, axis, role("line"), 1.5);
  levelBorders(pen, levels, x, top - 8, axis, role("line"));
  levelTicks(pen, context, about, { x, axis, hue, box });

  const piles = new Map();
  const tallest = items.reduce((most, item) => {
    piles.set(item.level, (piles.get(item.level) || 0) + 1);
    return Math.max(most, piles.get(item.level));
  }, 1);
  piles.clear();
  const rise = Math.min(radius * 2 + 1, (axis - top - 12) / tallest);
  for (const item of items) {
    const lit = item.n === about.hovered || item.n === about.now;
    const from = { x: x(item.value), y: top };
    if (!item.done || item.level < 0 || item.level >= levels.length) {
      lineDot(pen, from, radius, role("kept"), !item.done);
      continue;
    }
    const height = piles.get(item.level) || 0;
    piles.set(item.level, height + 1);
    const to = { x: x(levels[item.level]), y: axis - radius - 2 - height * rise };
    const t = about.landed && item.n >= about.landed.from ? about.landed.t : 1;
    const here = { x: from.x + (to.x - from.x) * t, y: from.y + (to.y - from.y) * t };
    pen.globalAlpha = lit ? 1 : many ? 0.16 : 0.5;
    lineRule(pen, from.x, from.y, here.x, here.y, lit ? role("ink") : hue(item.level), lit ? 2 : 1.2);
    pen.globalAlpha = 1;
    lineDot(pen, from, many ? 1.4 : 2.4, role("kept"), false);
    lineDot(pen, here, lit ? radius + 1.5 : radius, lit ? role("key") : hue(item.level), false);
    if (lit) lineWords(pen, context, format(item.value, lineFigures(about)), from.x, top - 8, role("ink"), "center", 12, box);
  }
}

/** As many decimals as tell values on this axis apart. */
function lineFigures({ low, high }) {
  const span = high - low;
  return span < 0.05 ? ".4f" : span < 0.5 ? ".3f" : span < 50 ? ".2f" : ".3g";
}

function levelBorders(pen, levels, x, from, to, colour) {
  if (levels.length > 40) return;
  pen.save();
  pen.setLineDash([2, 4]);
  for (let n = 1; n < levels.length; n += 1) lineRule(pen, x((levels[n] + levels[n - 1]) / 2), from, x((levels[n] + levels[n - 1]) / 2), to, colour, 1);
  pen.restore();
}

/** Each level with its code and, where there is room, its value; the scale between two of them. */
function levelTicks(pen, context, about, { x, axis, hue, box }) {
  const { levels, names } = about;
  const { role } = context.colours;
  let free = [-Infinity, -Infinity];
  levels.forEach((level, n) => {
    const at = x(level);
    if (at < box.x - 4 || at > box.x + box.width + 4) return;
    lineRule(pen, at, axis - 6, at, axis + 6, hue(n), levels.length > 64 ? 1 : 3);
    const name = names[n] === null ? "" : format(names[n] ?? n, ".0f");
    if (name && at - free[0] > 8 * name.length + 6) {
      lineWords(pen, context, name, at, axis + 18, role("ink"), "center", 13, box);
      free = [at + 4 * name.length, free[1]];
    }
    const value = format(level, lineFigures(about));
    if (at - free[1] > 4 * value.length + 8) {
      lineWords(pen, context, value, at, axis + 32, role("muted"), "center", 11, box);
      free = [free[0], at + 4 * value.length];
    }
  });
  if (about.scale === null || levels.length < 2) return;
  const zero = Math.min(levels.length - 2, Math.max(0, Math.floor(levels.length / 2) - 1));
  const [a, b] = [x(levels[zero]), x(levels[zero + 1])];
  if (b - a < 44) return;
  lineRule(pen, a + 3, axis - 12, b - 3, axis - 12, role("muted"), 1);
  for (const end of [a + 3, b - 3]) lineRule(pen, end, axis - 15, end, axis - 9, role("muted"), 1);
  lineWords(pen, context, `scale ${format(about.scale, ".3g")}`, (a + b) / 2, axis - 17, role("muted"), "center", 11, box);
}

function lineWords(pen, context, text, x, y, colour, align, size, box) {
  pen.font = `${size}px ${size === 12 && align === "left" ? context.fonts.text : context.fonts.mono}`;
  const half = pen.measureText(text).width / 2;
  pen.textAlign = align;
  pen.textBaseline = "alphabetic";
  pen.fillStyle = colour;
  pen.fillText(text, box && align === "center" ? Math.max(box.x + half - 4, Math.min(box.x + box.width - half + 4, x)) : x, y);
}

function lineRule(pen, x1, y1, x2, y2, colour, width) {
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.beginPath();
  pen.moveTo(x1, y1);
  pen.lineTo(x2, y2);
  pen.stroke();
}

function lineDot(pen, at, radius, colour, hollow) {
  pen.beginPath();
  pen.arc(at.x, at.y, radius, 0, 2 * Math.PI);
  if (hollow) {
    pen.strokeStyle = colour;
    pen.lineWidth = 1.5;
    pen.stroke();
  } else {
    pen.fillStyle = colour;
    pen.fill();
  }
}
