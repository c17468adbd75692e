// The list of samples. Only the rows in sight exist, so that tens of thousands of samples stay quick.
"use strict";
(() => {
  const { el, fixed, number, count, counted, visible } = paint;
  const MOST_FIGURES = 3; // beside the step; more have a line of their own
  const height = () => (list.figures.length > MOST_FIGURES ? 68 : 48); // of a row in pixels, as in samples.css
  const SPARE = 6; // rows above and below those in sight
  // The width of a column in pixels, and the text of a value.
  const FIGURES = {
    overlap: [48, fixed], reveal: [48, fixed], reward: [52, fixed], advantage: [68, fixed], loss: [52, (value) => number(value, 3)],
  };
  const list = { indices: [], at: -1, box: null, space: null, figures: [] };

  const tags = (samples, index) => {
    const found = [];
    if (samples.correct?.[index] === true) found.push(["right", "right"]);
    if (samples.correct?.[index] === false) found.push(["wrong", "wrong"]);
    if (samples.finished?.[index] === false) found.push(["cut off", "truncated"]);
    if (samples.left_out?.[index]) found.push(["left out", "out"]);
    return found.map(([text, kind]) => el("span", { class: `tag ${kind}`, text }));
  };
  paint.tags = tags;

  // What the list is sorted by, where it is in no column; else the number of tokens.
  const sortValue = (samples, index) => {
    const by = paint.sortedBy();
    if (by === "selected") return `${count(samples.selected[index])} selected`;
    return by === "gap" ? `gap ${number(samples.gap[index], 2)}` : counted(samples.tokens[index], "token");
  };

  const row = (place) => {
    const index = list.indices[place];
    const { samples, runs } = paint.data;
    const run = runs.length > 1 ? `${runs[samples.run[index]].name} · ` : "";
    const made = el(
      "div",
      {
        class: "row", role: "option", id: `row-${place}`, "aria-selected": String(place === list.at),
        "aria-setsize": String(list.indices.length), "aria-posinset": String(place + 1), "data-place": String(place),
      },
      el("span", { class: "problem", text: visible(samples.id[index]) }),
      el("span", { class: "tags" }, ...tags(samples, index)),
      el("span", { class: "where", text: visible(`${run}step ${samples.step[index]} · ${sortValue(samples, index)}`) }),
      el("span", { class: "figures" },
        el("span", { class: "hidden-text", text: `${list.figures.join(", ")}: ` }),
        ...list.figures.map((name) => el("span", { text: FIGURES[name][1](samples[name][index]) })),
      ),
    );
    made.style.transform = `translateY(${place * height()}px)`;
    return made;
  };

  const drawRows = () => {
    const { box, space } = list;
    const first = Math.max(0, Math.floor(box.scrollTop / height()) - SPARE);
    const last = Math.min(list.indices.length, Math.ceil((box.scrollTop + box.clientHeight) / height()) + SPARE);
    const rows = [];
    for (let place = first; place < last; place += 1) rows.push(row(place));
    // The row that has the focus exists for screen readers, wherever it is.
    if (list.at >= 0 && (list.at < first || list.at >= last)) rows.push(row(list.at));
    space.style.height = `${list.indices.length * height()}px`;
    space.replaceChildren(...rows);
    if (list.at >= 0) box.setAttribute("aria-activedescendant", `row-${list.at}`);
    else box.removeAttribute("aria-activedescendant");
  };

  const intoSight = () => {
    const [top, bottom] = [list.at * height(), (list.at + 1) * height()];
    const { box } = list;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
  };

  const choose = (place, { open = true } = {}) => {
    if (!list.indices.length) return;
    list.at = Math.min(Math.max(place, 0), list.indices.length - 1);
    intoSight();
    drawRows();
    if (open) paint.openSample(list.indices[list.at]);
  };
  paint.nextSample = (step) => choose(list.at < 0 ? 0 : list.at + step);

  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
  const onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" && list.at >= 0) {
      event.preventDefault();
      paint.openSample(list.indices[list.at], { focus: true });
    } else if (event.key in steps) {
      event.preventDefault();
      choose(list.at < 0 ? 0 : list.at + steps[event.key]);
    }
  };

  const onclick = (event) => {
    const found = event.target.closest("[data-place]");
    if (!found) return;
    choose(Number(found.dataset.place), { open: false });
    paint.openSample(list.indices[list.at], { focus: matchMedia("(max-width: 820px)").matches });
  };

  const total = el("p", { class: "total" });
  const update = () => {
    const kept = list.at >= 0 ? list.indices[list.at] : paint.openedSample();
    list.indices = paint.matching();
    list.at = list.indices.indexOf(kept);
    const all = paint.data.samples.run.length;
    total.textContent = list.indices.length === all ? counted(all, "sample") : `${count(list.indices.length)} of ${counted(all, "sample")}`;
    list.box.hidden = !list.indices.length;
    if (list.box.clientHeight) {
      list.box.scrollTop = Math.min(list.box.scrollTop, Math.max(0, list.indices.length * height() - list.box.clientHeight));
      drawRows();
    }
  };
  paint.updateList = () => list.box && update();
  paint.moveList = (moved) => (list.indices = list.indices.map((index) => moved[index]));
  paint.markInList = (index) => {
    list.at = list.indices.indexOf(index);
    if (list.at >= 0) intoSight();
    drawRows();
  };
  paint.focusList = () => list.box.focus();

  paint.showSamples = (view) => {
    list.space = el("div", { class: "space", role: "presentation" });
    list.box = el("div", { class: "rows", role: "listbox", tabindex: "0", "aria-label": "Samples", onkeydown, onclick }, list.space);
    list.box.addEventListener("scroll", drawRows, { passive: true });
    new ResizeObserver(() => list.box.clientHeight && drawRows()).observe(list.box);
    list.figures = Object.keys(FIGURES).filter((name) => paint.known(name));
    const heads = el("div", { class: "heads", "aria-hidden": "true" }, total,
      el("span", { class: "figures" }, ...list.figures.map((text) => el("span", { text }))));
    view.classList.toggle("many-figures", list.figures.length > MOST_FIGURES);
    view.style.setProperty("--figures", list.figures.map((name) => `${FIGURES[name][0]}px`).join(" "));
    view.replaceChildren(
      el("div", { class: "sidebar" }, paint.filterBar(update), heads, list.box),
      el("article", { id: "sample", class: "detail", tabindex: "-1", "aria-label": "Sample" },
        el("p", { class: "empty", text: "Choose a sample from the list: with a click, or with the keys j and k." })),
    );
    update();
    paint.reopenSample();
  };
})();
