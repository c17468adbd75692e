// Settings with what differs, and the log: starts, warnings, skipped steps and changed settings in order.
"use strict";
(() => {
  const { el, visible } = paint;
  const state = { which: null, text: "" };

  const rowsShown = () => {
    const wanted = state.text.toLowerCase();
    return paint.data.settings.filter(
      (row) =>
        (state.which === "all" || (state.which === "changed" ? row.changed : row.differs)) &&
        (!wanted || `${row.key} ${row.values.join(" ")} ${row.meaning}`.toLowerCase().includes(wanted)),
    );
  };

  const settingsTable = () => {
    const runs = paint.data.runs;
    const rows = rowsShown();
    if (!rows.length) return el("p", { class: "empty", text: "No setting matches." });
    const heads = ["Setting", ...(runs.length > 1 ? runs.map((run) => run.name) : ["Value"]), "Default"];
    return paint.table("Settings", heads, rows.map((row) => [
      el("div", { class: "setting" }, el("code", { text: visible(row.key) }), el("span", { class: "meaning", text: visible(row.meaning) })),
      ...row.values.map((value) => el("code", { class: value === row.default ? "" : "changed", text: visible(value) || "–" })),
      el("code", { class: "default", text: visible(row.default) || "–" }),
    ]));
  };

  paint.showSettings = (view) => {
    const several = paint.data.runs.length > 1;
    state.which ??= several ? "differs" : "changed";
    const place = el("div", { class: "panel settings" });
    const update = () => place.replaceChildren(settingsTable());
    const options = [["changed", "differ from the default"], ...(several ? [["differs", "differ between the runs"]] : []), ["all", "all"]];
    const which = paint.select(options, state.which, (chosen) => {
      state.which = chosen;
      update();
    });
    const text = el("input", { type: "search", autocomplete: "off", value: state.text, oninput: () => {
      state.text = text.value;
      update();
    } });
    view.replaceChildren(
      el("div", { class: "controls" }, paint.field("Settings that", which, "settings-which"), paint.field("Text", text, "settings-text")),
      place,
    );
    update();
  };

  // Everything of one run in order: by the number of the start, which comes first, and the step before it.
  const entries = (run) => {
    const found = run.starts.map((start, index) => ({
      start: index + 1, step: start.after_step, rank: 0, kind: "start",
      when: start.when, text: `${start.host}: ${start.command}`,
    }));
    for (const event of run.events) {
      found.push({ start: event.start, step: event.after_step, rank: 2, kind: event.kind === "end" ? "end" : "warning", when: event.time, text: event.text });
    }
    for (const [step, text, start] of run.skipped) {
      if (!run.events.some((event) => event.text.startsWith(`step ${step} is skipped`))) {
        found.push({ start, step, rank: 2, kind: "skipped", when: "", text: `step ${step} is skipped: ${text}` });
      }
    }
    for (const change of run.changes) {
      found.push({ start: change.start, step: Number(change.after_step), rank: 1, kind: "changed", when: change.time.replace("T", " ").replace("+00:00", " UTC"), text: `${change.setting}: ${change.old} -> ${change.new}` });
    }
    return found.map((entry, index) => ({ ...entry, index })).sort((a, b) => a.start - b.start || a.rank - b.rank || a.step - b.step || a.index - b.index);
  };

  paint.showLog = (view) => {
    const parts = paint.data.runs.map((run) => {
      const found = entries(run);
      const heads = ["Kind", "After step", "Time", "Text"];
      const rows = found.map((entry) => [
        el("span", { class: `kind ${entry.kind}`, text: entry.kind }),
        entry.step ? String(entry.step) : "–",
        entry.when,
        el("span", { class: "long", text: visible(entry.text) }),
      ]);
      return el(
        "div",
        { class: "panel log" },
        el("h2", { text: visible(run.name) }),
        found.length ? paint.table(`Log of ${run.name}`, heads, rows, { numeric: [1] }) : el("p", { class: "empty", text: "The run has no warnings." }),
      );
    });
    view.replaceChildren(...parts);
  };
})();
