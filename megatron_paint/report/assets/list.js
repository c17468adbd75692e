// A list beside the details of one of its rows. Only the rows in sight exist, so that tens of thousands stay quick.
"use strict";
(() => {
  const { el, count, visible } = paint;
  const SPARE = 6; // rows above and below those in sight
  const MOST_FIGURES = 3; // beside the step; more have a line of their own

  // kind: what is listed, see viewer.js. viewer: opens a row.
  paint.list = (kind, filters, viewer) => {
    const list = { indices: [], at: -1, box: null, space: null, figures: [] };
    const rows = () => paint.data[kind.name];
    const height = () => (list.figures.length > MOST_FIGURES ? 68 : 48); // of a row in pixels, as in samples.css
    const id = (place) => `${kind.prefix}row-${place}`;

    const row = (place) => {
      const index = list.indices[place];
      const [columns, { runs }] = [rows(), paint.data];
      const run = runs.length > 1 ? `${runs[columns.run[index]].name} · ` : "";
      const made = el(
        "div",
        {
          class: "row", role: "option", id: id(place), "aria-selected": String(place === list.at),
          "aria-setsize": String(list.indices.length), "aria-posinset": String(place + 1), "data-place": String(place),
        },
        el("span", { class: "problem", text: visible(columns.id[index]) }),
        el("span", { class: "tags" }, ...paint.tags(kind.tags(columns, index))),
        el("span", { class: "where", text: visible(`${run}step ${columns.step[index]} · ${kind.aside(columns, index, filters.sortedBy())}`) }),
        el("span", { class: "figures" },
          el("span", { class: "hidden-text", text: `${list.figures.join(", ")}: ` }),
          ...list.figures.map((name) => el("span", { text: kind.figures[name][1](columns[name][index], columns, index) })),
        ),
      );
      made.style.transform = `translateY(${place * height()}px)`;
      return made;
    };

    const drawRows = () => {
      const { box, space } = list;
      const first = Math.max(0, Math.floor(box.scrollTop / height()) - SPARE);
      const last = Math.min(list.indices.length, Math.ceil((box.scrollTop + box.clientHeight) / height()) + SPARE);
      const made = [];
      for (let place = first; place < last; place += 1) made.push(row(place));
      // The row that has the focus exists for screen readers, wherever it is.
      if (list.at >= 0 && (list.at < first || list.at >= last)) made.push(row(list.at));
      space.style.height = `${list.indices.length * height()}px`;
      space.replaceChildren(...made);
      if (list.at >= 0) box.setAttribute("aria-activedescendant", id(list.at));
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
      if (open) viewer.open(list.indices[list.at]);
    };

    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
    const onkeydown = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Enter" && list.at >= 0) {
        event.preventDefault();
        viewer.open(list.indices[list.at], { focus: true });
      } else if (event.key in steps) {
        event.preventDefault();
        choose(list.at < 0 ? 0 : list.at + steps[event.key]);
      }
    };

    const onclick = (event) => {
      const found = event.target.closest("[data-place]");
      if (!found) return;
      choose(Number(found.dataset.place), { open: false });
      viewer.open(list.indices[list.at], { focus: matchMedia("(max-width: 820px)").matches });
    };

    const total = el("p", { class: "total" });
    const update = () => {
      if (!list.box) return;
      const kept = list.at >= 0 ? list.indices[list.at] : viewer.opened();
      list.indices = filters.matching();
      list.at = list.indices.indexOf(kept);
      const all = rows().run.length;
      total.textContent = `${list.indices.length === all ? "" : `${count(list.indices.length)} of `}${kind.counted(all)}`;
      list.box.hidden = !list.indices.length;
      if (list.box.clientHeight) {
        list.box.scrollTop = Math.min(list.box.scrollTop, Math.max(0, list.indices.length * height() - list.box.clientHeight));
        drawRows();
      }
    };

    return {
      update,
      next: (step) => choose(list.at < 0 ? 0 : list.at + step),
      move: (moved) => (list.indices = list.indices.map((index) => moved[index])),
      mark: (index) => {
        list.at = list.indices.indexOf(index);
        if (list.at >= 0) intoSight();
        drawRows();
      },
      focus: () => list.box.focus(),
      show: (view, detail, rebuild) => {
        list.space = el("div", { class: "space", role: "presentation" });
        list.box = el("div", { class: "rows", role: "listbox", tabindex: "0", "aria-label": kind.label, onkeydown, onclick }, list.space);
        list.box.addEventListener("scroll", drawRows, { passive: true });
        new ResizeObserver(() => list.box.clientHeight && drawRows()).observe(list.box);
        list.figures = Object.keys(kind.figures).filter((name) => paint.known(rows(), name));
        const heads = el("div", { class: "heads", "aria-hidden": "true" }, total,
          el("span", { class: "figures" }, ...list.figures.map((text) => el("span", { text }))));
        view.classList.toggle("many-figures", list.figures.length > MOST_FIGURES);
        view.style.setProperty("--figures", list.figures.map((name) => `${kind.figures[name][0]}px`).join(" "));
        view.replaceChildren(el("div", { class: "sidebar" }, filters.bar(update, rebuild), heads, list.box), detail);
        update();
      },
    };
  };
})();
