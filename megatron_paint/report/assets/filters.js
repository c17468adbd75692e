// Which rows of a list are shown and in which order: filters on the values of its columns, and a search in texts.
"use strict";
(() => {
  const { el, field, select, isNumber } = paint;
  const WAIT = 250; // milliseconds after the last key

  const inRange = (value, low, high) =>
    (low === undefined || (isNumber(value) && value >= low)) && (high === undefined || (isNumber(value) && value <= high));

  // kind: what is listed, see viewer.js.
  paint.filters = (kind) => {
    const fresh = () => ({ run: "", chosen: {}, from: {}, to: {}, text: "" });
    const state = { ...fresh(), sort: "step", down: false, hits: null, search: 0 };
    const rows = () => paint.data[kind.name];
    const known = (names) => Object.entries(names).filter(([name]) => paint.known(rows(), name));

    const passes = (columns, index) => {
      if (state.run !== "" && columns.run[index] !== Number(state.run)) return false;
      for (const name of Object.keys(kind.ranges)) {
        if (!inRange(columns[name]?.[index], state.from[name], state.to[name])) return false;
      }
      for (const [name, chosen] of Object.entries(state.chosen)) {
        const { column, passes: pass } = kind.choices[name];
        if (chosen !== "" && !pass(chosen, columns[column]?.[index], columns, index)) return false;
      }
      return state.hits === null || state.hits.has(index);
    };

    const compare = (columns) => {
      const values = columns[state.sort] ?? columns.step;
      const sign = state.down ? -1 : 1;
      return (a, b) => {
        const [x, y] = [values[a], values[b]];
        if (x === y) return a - b;
        if (x === null || x === undefined) return 1; // what is not known comes last, in both directions
        if (y === null || y === undefined) return -1;
        return (x < y ? -1 : 1) * sign;
      };
    };

    const clear = () => Object.assign(state, fresh(), { hits: null, search: state.search + 1 });

    const matching = () => {
      const columns = rows();
      const found = [];
      for (let index = 0; index < columns.run.length; index += 1) if (passes(columns, index)) found.push(index);
      return found.sort(compare(columns));
    };

    // Looks into the pages one after another; a newer search ends an older one. `kept` are listed until the search ends.
    const search = async (changed, progress, kept = []) => {
      const number = (state.search += 1);
      const wanted = state.text.trim().toLowerCase();
      if (!wanted) {
        state.hits = null;
        progress("");
        changed();
        return;
      }
      const columns = rows();
      const hits = new Set();
      const pages = new Map();
      for (let index = 0; index < columns.run.length; index += 1) {
        const key = paint.pageKey(columns, index);
        if (columns.id[index].toLowerCase().includes(wanted)) hits.add(index);
        if (!pages.has(key)) pages.set(key, []);
        pages.get(key).push(index);
      }
      const listed = () => (state.hits = new Set([...kept, ...hits]));
      listed();
      changed();
      let done = 0;
      let shown = performance.now();
      for (const [key, indices] of pages) {
        try {
          const { entries } = await paint.passingPage(key);
          const contains = (index) => kind.texts(entries[columns.place[index]]).some((text) => text.toLowerCase().includes(wanted));
          for (const index of indices) if (contains(index)) hits.add(index);
        } catch (error) {
          progress(error.message);
          return;
        }
        if (number !== state.search) return;
        done += 1;
        if (performance.now() - shown > 200) {
          shown = performance.now();
          listed();
          progress(`searched ${done} of ${pages.size} pages`);
          changed();
        }
      }
      state.hits = hits;
      progress("");
      changed();
    };

    const active = () =>
      [state.run, ...Object.values(state.chosen)].filter(Boolean).length +
      Object.keys(state.from).length + Object.keys(state.to).length;

    const rangeField = (name, label, changed) => {
      const bound = (which, word) => {
        const input = el("input", { type: "number", step: "any", "aria-label": `${label}, ${word}`, placeholder: word, oninput: () => {
          if (input.value === "" || Number.isNaN(Number(input.value))) delete state[which][name];
          else state[which][name] = Number(input.value);
          changed();
        } });
        input.id = `${kind.prefix}filter-${name}-${which}`;
        if (state[which][name] !== undefined) input.value = state[which][name];
        return input;
      };
      return el("fieldset", { class: "range" }, el("legend", { text: label }), bound("from", "least"), bound("to", "most"));
    };

    const choice = (name, label, options, values, changed) =>
      field(label, select([["", "any"], ...options], values[name] ?? "", (value) => {
        values[name] = value;
        changed();
      }), `${kind.prefix}filter-${name}`);

    const choices = (update) =>
      Object.entries(kind.choices)
        .filter(([, { column }]) => paint.known(rows(), column))
        .map(([name, { label, options }]) => [name, label, typeof options === "function" ? options(rows()) : options])
        .filter(([, , options]) => options.length > 1)
        .map(([name, label, options]) => choice(name, label, options, state.chosen, update));

    const filters = {
      matching,
      sortedBy: () => state.sort,
      // Removes all filters but one: the step.
      onlyStep: (step) => Object.assign(clear(), { from: { step }, to: { step } }),
      searchAgain: () => {}, // of the present bar
    };

    filters.bar = (changed, rebuild) => {
      const progress = el("span", { class: "progress", role: "status" });
      const text = el("input", { type: "search", autocomplete: "off", spellcheck: "false", placeholder: "problem or text" });
      text.value = state.text;
      let timer = 0;
      const look = (kept) => search(changed, (message) => (progress.textContent = message), kept);
      filters.searchAgain = (moved) => {
        if (state.hits) look([...state.hits].map((index) => moved[index]));
      };
      text.addEventListener("input", () => {
        state.text = text.value;
        clearTimeout(timer);
        timer = setTimeout(() => look(), WAIT);
      });
      const summary = el("summary", {});
      const count = () => (summary.textContent = active() ? `Filters (${active()})` : "Filters");
      const update = () => {
        count();
        changed();
      };
      const runs = paint.data.runs.map((run, index) => [String(index), run.name]);
      const reset = el("button", { type: "button", text: "Remove all filters", onclick: () => {
        clear();
        rebuild();
        document.getElementById(`${kind.prefix}search`).focus();
      } });
      const direction = el("button", { type: "button", onclick: () => {
        state.down = !state.down;
        name();
        changed();
      } });
      const name = () => {
        direction.textContent = state.down ? "descending" : "ascending";
        direction.setAttribute("aria-label", `Order: ${direction.textContent}`);
      };
      name();
      const details = el("details", { class: "filters" }, summary, el(
        "div",
        { class: "controls" },
        runs.length > 1 ? choice("run", "Run", runs, state, update) : null,
        ...known(kind.ranges).map(([key, label]) => rangeField(key, label, update)),
        ...choices(update),
        reset,
      ));
      details.open = active() > 0;
      const sort = select(known(kind.sorts), state.sort, (value) => {
        state.sort = value;
        state.down = kind.down.has(value);
        name();
        changed();
      });
      count();
      const sortField = field("Sort by", sort, `${kind.prefix}sort`);
      sortField.append(direction);
      return el("div", { class: "filterbar" }, field("Search", text, `${kind.prefix}search`), sortField, details, progress);
    };
    return filters;
  };
})();
