// A list, its filters and the details of one row: of samples, and of the answers of evaluations.
"use strict";
(() => {
  const { el, visible } = paint;

  paint.tags = (tags) => tags.map(([text, kind]) => el("span", { class: `tag ${kind}`, text }));

  // kind: what the viewer shows.
  //   name      of its view and of its columns in the data
  //   prefix    of the ids of its elements; detail: the id of the details
  //   label, counted, empty   its name, the text of a number of rows, and the text before a row is chosen
  //   ranges, sorts, down     labels by column; the columns whose largest values come first
  //   choices   by name: label, column, options, and passes(chosen, value, columns, index)
  //   figures   by column: its width in pixels, and the text of a value
  //   tags, aside, where      what a row and a heading say
  //   texts     of an entry, for the search; content: the details of an entry
  //   alike     rows that belong together with a row, in an order that the key g follows
  paint.viewer = (kind) => {
    const opened = { index: null, number: 0 };
    const rows = () => paint.data[kind.name];
    const view = () => document.getElementById(`view-${kind.name}`);
    const viewer = { kind, opened: () => opened.index };
    const filters = paint.filters(kind);
    const list = paint.list(kind, filters, viewer);
    viewer.address = (index) => `${kind.name}/${rows().run[index]}/${rows().page[index]}/${rows().place[index]}`;

    const head = (index) => {
      const [columns, { runs }] = [rows(), paint.data];
      const run = runs.length > 1 ? `${runs[columns.run[index]].name}, ` : "";
      return el("header", {},
        el("div", { class: "titles" },
          el("h2", { text: visible(columns.id[index]) }),
          el("p", { class: "where", text: visible(`${run}step ${columns.step[index]}${kind.where(columns, index)}`) })),
        el("span", { class: "tags" }, ...paint.tags(kind.tags(columns, index))),
        el("div", { class: "steps" },
          el("button", { type: "button", class: "back", text: "List", onclick: () => viewer.close() }),
          el("button", { type: "button", text: "Previous", onclick: () => list.next(-1) }),
          el("button", { type: "button", text: "Next", onclick: () => list.next(1) })));
    };

    viewer.open = async (index, { focus = false } = {}) => {
      const number = (opened.number += 1);
      opened.index = index;
      const place = document.getElementById(kind.detail);
      view().classList.add("opened");
      const columns = rows();
      history.replaceState(null, "", `#${viewer.address(index)}`);
      let content;
      try {
        const entry = await paint.entry(columns, index);
        if (rows() !== columns) { // a live report was updated meanwhile
          if (number === opened.number && opened.index !== null) viewer.open(opened.index, { focus });
          return;
        }
        content = [head(index), ...kind.content(entry, index)];
      } catch (error) {
        content = [head(index), el("p", { class: "callout", role: "alert", text: `This ${kind.one} cannot be shown: ${error.message}` })];
      }
      if (number !== opened.number) return; // another one was opened meanwhile
      const moved = place.contains(document.activeElement);
      const label = moved ? document.activeElement.textContent : "";
      place.replaceChildren(...content.filter(Boolean));
      place.scrollTop = 0;
      if (focus) place.focus();
      else if (moved) ([...place.querySelectorAll("header button, .group a")].find((one) => one.textContent === label) ?? place).focus();
      paint.say(`Problem ${columns.id[index]}, step ${columns.step[index]}`);
    };

    viewer.close = () => {
      view().classList.remove("opened");
      list.update();
      list.focus();
    };

    // The row of an address such as #samples/0/25_0/3.
    viewer.follow = (run, page, place) => {
      const columns = rows();
      for (let index = 0; index < columns.run.length; index += 1) {
        if (columns.run[index] !== Number(run) || columns.page[index] !== page || columns.place[index] !== Number(place)) continue;
        if (index === opened.index) return;
        viewer.open(index);
        list.mark(index);
        return;
      }
    };

    viewer.show = () => {
      const detail = el("article", { id: kind.detail, class: "detail", tabindex: "-1", "aria-label": kind.one },
        el("p", { class: "empty", text: rows().run.length ? kind.empty : kind.none }));
      list.show(view(), detail, viewer.show);
      if (opened.index !== null && opened.index < rows().run.length) {
        viewer.open(opened.index);
        list.mark(opened.index);
      }
    };

    viewer.nextAlike = () => {
      if (opened.index === null) return;
      const found = kind.alike(opened.index);
      location.hash = `#${viewer.address(found[(found.indexOf(opened.index) + 1) % found.length])}`;
    };

    // After the data have changed. moved: the new index of each old row.
    viewer.move = (moved) => {
      if (opened.index !== null) opened.index = moved[opened.index] ?? null;
      list.move(moved);
    };
    return Object.assign(viewer, {
      update: list.update, next: list.next, onlyStep: filters.onlyStep, searchAgain: (moved) => filters.searchAgain(moved),
    });
  };
  paint.viewers = {};

  // The rows `found`, which belong together: a link to each, its tags, and columns (name, label, text of a value).
  paint.groupTable = ({ kind, address }, index, found, { title, unit, first: [name, label], columns }) => {
    const values = paint.data[kind.name];
    const known = columns.filter(([column]) => paint.known(values, column, values.run[index]));
    const rows = found.map((one) => [
      el("a", {
        href: `#${address(one)}`, "aria-current": one === index ? "true" : null,
        "aria-label": `${name} ${values[name][one]}`, text: String(values[name][one]),
      }),
      el("span", { class: "tags" }, ...paint.tags(kind.tags(values, one))),
      ...known.map(([column, , text]) => text(values[column][one], values, one)),
    ]);
    return el("section", { class: "group" }, el("h3", {}, title, el("span", { class: "unit", text: unit })),
      paint.table(title, [label, "", ...known.map((column) => column[1])], rows, { numeric: known.map((_, at) => at + 2), stack: false }));
  };
})();
