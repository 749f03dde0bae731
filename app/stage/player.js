/**
 * The one clock of a page. It knows which step is shown, how many steps are computed and how many are expected;
 * everything drawn is a function of the step. Speed is in steps a second, independent of the frame rate.
 */

export const SPEEDS = [0.5, 1, 2, 4, 8];

/** Whether the reader asked for less motion: then the player jumps where it would glide. */
export function calm() {
  return window.matchMedia("(prefers-reduced-motion: reduce)").matches;
}

export class Player {
  constructor() {
    this.step = 0;
    this.steps = 0;
    this.total = 0;
    this.speed = 1;
    this.playing = false;
    this.want = Infinity; // where the playhead goes as steps arrive; Infinity follows the newest
    this.frames = 0;
    this.position = 0; // the step, with a fraction while playing
    this.listeners = new Set();
    this.stale = false; // something besides the step changed: draw again
    this.scheduled = 0;
    this.glide = null;
  }

  /** `listener({step, position, redraw})` is called in every frame in which something moved. */
  listen(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  get following() {
    return this.want === Infinity;
  }

  get last() {
    return Math.max(0, this.steps - 1);
  }

  /** Steps a second at speed 1: a whole run takes about twelve seconds, short ones are not rushed. */
  get rate() {
    return Math.min(40, Math.max(3, Math.max(this.total, this.steps) / 12));
  }

  /** More steps have been computed (or a new run began). The playhead goes on to where it was wanted. */
  extend(steps, total) {
    this.steps = steps;
    this.total = Math.max(total, steps);
    if (!this.playing && !this.glide) this.place(Math.min(this.want, this.last));
    else if (this.step > this.last) this.place(this.last);
    this.redraw();
  }

  /** The learner, or a beat, goes to a step. Beyond what is computed it waits there. */
  go(step) {
    const wanted = Math.max(0, Math.round(step));
    this.glide = null;
    this.want = wanted >= this.last && this.steps < this.total ? Infinity : wanted;
    this.place(Math.min(wanted, this.last));
  }

  /** Wait for `step`, which may not be computed yet, without following past it. */
  waitFor(step) {
    this.pause();
    this.want = step;
    this.place(Math.min(step, this.last));
  }

  follow() {
    this.pause();
    this.want = Infinity;
    this.place(this.last);
  }

  by(count) {
    this.pause();
    this.go(this.step + count);
  }

  play() {
    if (this.playing) return;
    this.glide = null;
    if (this.step >= this.last && this.steps >= this.total) this.place(0);
    this.want = Infinity;
    this.playing = true;
    this.before = performance.now();
    this.redraw();
  }

  pause() {
    this.glide = null;
    if (!this.playing) return;
    this.playing = false;
    this.want = this.step;
    this.position = this.step;
    this.redraw();
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  /** A short, fast motion to `step`, then stillness. */
  glideTo(step, milliseconds = 1400) {
    this.pause();
    const to = Math.min(step, this.last);
    if (calm() || to === this.step) return this.waitFor(step);
    this.want = step;
    this.glide = { from: this.step, to, start: performance.now(), milliseconds };
    return this.redraw();
  }

  /** Draw again although the step is the same: data, theme or size changed. */
  redraw() {
    this.stale = true;
    this.schedule();
  }

  place(step) {
    this.position = step;
    if (step !== this.step) {
      this.step = step;
      this.stale = true;
    }
    this.schedule();
  }

  schedule() {
    if (!this.scheduled) this.scheduled = requestAnimationFrame((now) => this.tick(now));
  }

  tick(now) {
    this.scheduled = 0;
    this.advance(now);
    const { step, position, stale } = this;
    this.stale = false;
    if (stale) this.frames += 1;
    for (const listener of this.listeners) listener({ step, position, redraw: stale });
    if (this.playing || this.glide) this.schedule();
  }

  advance(now) {
    if (this.glide) {
      const { from, to, start, milliseconds } = this.glide;
      const t = Math.min(1, (now - start) / milliseconds);
      const eased = t < 0.5 ? 2 * t * t : 1 - (2 - 2 * t) ** 2 / 2;
      this.move(from + (to - from) * eased);
      if (t >= 1) this.glide = null;
    } else if (this.playing) {
      const elapsed = Math.min(0.25, (now - this.before) / 1000);
      this.before = now;
      this.move(this.position + Math.max(0, elapsed) * this.rate * this.speed);
      if (this.step >= this.last && this.steps >= this.total) this.pause();
    }
  }

  move(position) {
    this.position = Math.min(this.last, Math.max(0, position));
    const step = Math.floor(this.position + 1e-6);
    if (step !== this.step) {
      this.step = step;
      this.stale = true;
    }
  }

  stop() {
    cancelAnimationFrame(this.scheduled);
    this.listeners.clear();
  }
}
