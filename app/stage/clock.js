/** A presenter's clock: how long it has been. It survives a reload of the page, and can be held and set back. */

const CLOCK = "leanscope-clock";

export function createClock() {
  let { sum, since } = savedClock();

  const keep = () => {
    try {
      sessionStorage.setItem(CLOCK, JSON.stringify({ sum, since }));
    } catch {
      // A browser that keeps nothing still counts for this visit.
    }
  };

  const elapsed = () => sum + (since ? Date.now() - since : 0);

  return {
    get running() {
      return since > 0;
    },
    start() {
      if (!since) since = Date.now();
      keep();
    },
    toggle() {
      sum = elapsed();
      since = since ? 0 : Date.now();
      keep();
    },
    reset() {
      sum = 0;
      if (since) since = Date.now();
      keep();
    },
    /** "4:07", or "1:04:07" after an hour. */
    get text() {
      const seconds = Math.floor(elapsed() / 1000);
      const two = (n) => String(n).padStart(2, "0");
      const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
      return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
    },
  };
}

function savedClock() {
  try {
    const { sum, since } = JSON.parse(sessionStorage.getItem(CLOCK)) || {};
    return { sum: Number(sum) || 0, since: Number(since) || 0 };
  } catch {
    return { sum: 0, since: 0 };
  }
}
