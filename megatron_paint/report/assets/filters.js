// Which samples are listed and in which order: filters on the numbers of the list, and a search in texts.
"use strict";
(() => {
  const { el, field, select, isNumber } = paint;
  const RANGES = {
    step: "Step", overlap: "Overlap", reveal: "Reveal", reward: "Reward", advantage: "Advantage", loss: "Loss", tokens: "Tokens",
  };
  const SORTS = {
    step: "step", loss: "loss", overlap: "overlap", reveal: "reveal", reward: "reward", advantage: "advantage",
    tokens: "tokens", selected: "selected tokens", gap: "sampler gap", id: "problem",
  };
  const DOWN = new Set(["reward", "advantage", "loss", "tokens", "selected", "gap"]); // whose largest values are what one looks for
  const WAIT = 250; // milliseconds after the last key
  const known = (names) => Object.entries(names).filter(([name]) => paint.known(name));
  const fresh = () => ({ run: "", ended: "", answer: "", trained: "", from: {}, to: {}, text: "" });
  const state = { ...fresh(), sort: "step", down: false, hits: null, search: 0 };

  const inRange = (value, low, high) =>
    (low === undefined || (isNumber(value) && value >= low)) && (high === undefined || (isNumber(value) && value <= high));

  const passes = (samples, index) => {
    if (state.run !== "" && samples.run[index] !== Number(state.run)) return false;
    for (const name of Object.keys(RANGES)) {
      if (!inRange(samples[name]?.[index], state.from[name], state.to[name])) return false;
    }
    const [finished, correct, left] = ["finished", "correct", "left_out"].map((name) => samples[name]?.[index]);
    if (state.ended === "cut" && finished !== false) return false;
    if (state.ended === "whole" && finished !== true) return false;
    if (state.answer === "right" && correct !== true) return false;
    if (state.answer === "wrong" && correct !== false) return false;
    if (state.answer === "none" && typeof correct === "boolean") return false;
    if (state.trained === "yes" && left) return false;
    if (state.trained === "no" && !left) return false;
    return state.hits === null || state.hits.has(index);
  };

  const compare = (samples) => {
    const values = samples[state.sort] ?? samples.step;
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
  // Removes all filters but one: the step.
  paint.onlyStep = (step) => Object.assign(clear(), { from: { step }, to: { step } });

  paint.sortedBy = () => state.sort;
  paint.matching = () => {
    const { samples } = paint.data;
    const found = [];
    for (let index = 0; index < samples.run.length; index += 1) if (passes(samples, index)) found.push(index);
    return found.sort(compare(samples));
  };

  const contains = (entry, wanted) =>
    entry.text.toLowerCase().includes(wanted) ||
    (entry.reveal?.reference_text ?? "").toLowerCase().includes(wanted) ||
    Object.values(entry.prompts ?? {}).some((prompt) => prompt.toLowerCase().includes(wanted));

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
    const { samples } = paint.data;
    const hits = new Set();
    const pages = new Map();
    for (let index = 0; index < samples.run.length; index += 1) {
      const key = paint.pageKey(index);
      if (samples.id[index].toLowerCase().includes(wanted)) hits.add(index);
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
        const page = await paint.passingPage(key);
        for (const index of indices) if (contains(page.samples[samples.place[index]], wanted)) hits.add(index);
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
  paint.searchAgain = () => {}; // of the present filter bar

  const active = () =>
    [state.run, state.ended, state.answer, state.trained].filter(Boolean).length +
    Object.keys(state.from).length + Object.keys(state.to).length;

  const rangeField = (name, label, changed) => {
    const bound = (which, word) => {
      const input = el("input", { type: "number", step: "any", "aria-label": `${label}, ${word}`, placeholder: word, oninput: () => {
        if (input.value === "" || Number.isNaN(Number(input.value))) delete state[which][name];
        else state[which][name] = Number(input.value);
        changed();
      } });
      input.id = `filter-${name}-${which}`;
      if (state[which][name] !== undefined) input.value = state[which][name];
      return input;
    };
    return el("fieldset", { class: "range" }, el("legend", { text: label }), bound("from", "least"), bound("to", "most"));
  };

  const choice = (name, label, options, changed) =>
    field(label, select([["", "any"], ...options], state[name], (value) => {
      state[name] = value;
      changed();
    }), `filter-${name}`);

  paint.filterBar = (changed) => {
    const progress = el("span", { class: "progress", role: "status" });
    const text = el("input", { type: "search", autocomplete: "off", spellcheck: "false", placeholder: "problem or text" });
    text.value = state.text;
    let timer = 0;
    const look = (kept) => search(changed, (message) => (progress.textContent = message), kept);
    paint.searchAgain = (moved) => {
      if (state.hits) look([...state.hits].map((index) => moved[index]));
    };
    text.addEventListener("input", () => {
      state.text = text.value;
      clearTimeout(timer);
      timer = setTimeout(() => look(), WAIT);
    });
    const summary = el("summary", {});
    const update = () => {
      summary.textContent = active() ? `Filters (${active()})` : "Filters";
      changed();
    };
    const runs = paint.data.runs.map((run, index) => [String(index), run.name]);
    const reset = el("button", { type: "button", text: "Remove all filters", onclick: () => {
      clear();
      paint.showSamples(document.getElementById("view-samples"));
      document.getElementById("search").focus();
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
      runs.length > 1 ? choice("run", "Run", runs, update) : null,
      ...known(RANGES).map(([key, label]) => rangeField(key, label, update)),
      paint.known("finished") ? choice("ended", "Ended", [["whole", "complete"], ["cut", "cut off"]], update) : null,
      paint.known("correct") ? choice("answer", "Answer", [["right", "right"], ["wrong", "wrong"], ["none", "not graded"]], update) : null,
      paint.known("left_out") ? choice("trained", "Trained on", [["yes", "yes"], ["no", "left out"]], update) : null,
      reset,
    ));
    details.open = active() > 0;
    const sort = select(known(SORTS), state.sort, (value) => {
      state.sort = value;
      state.down = DOWN.has(value);
      name();
      changed();
    });
    summary.textContent = active() ? `Filters (${active()})` : "Filters";
    const sortField = field("Sort by", sort, "sort");
    sortField.append(direction);
    return el("div", { class: "filterbar" }, field("Search", text, "search"), sortField, details, progress);
  };
})();
