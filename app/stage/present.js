/** How the page may be seen from outside: on a projector, and by scripts. */

/** Large type for a projector: ?present=1, kept in the address. */
export function presenting(root) {
  const on = () => root.classList.contains("present");
  return {
    on,
    toggle() {
      root.classList.toggle("present");
      const url = new URL(location.href);
      if (on()) url.searchParams.set("present", "1");
      else url.searchParams.delete("present");
      if (location.protocol !== "file:") history.replaceState(history.state, "", url);
      return on();
    },
  };
}

/** What tests and teachers' scripts may read; nothing that they could change. */
export function expose({ lesson, player, ready, run }) {
  const view = Object.freeze({
    get lesson() {
      return lesson.slug;
    },
    get step() {
      return player.step;
    },
    get steps() {
      return player.steps;
    },
    get ready() {
      return ready();
    },
    get frames() {
      return player.frames;
    },
    /** Which run the picture shows. */
    get run() {
      return run();
    },
  });
  Object.defineProperty(window, "leanscope", { value: view, configurable: true });
}
