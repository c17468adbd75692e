// Keys of the complete page, and the dialog that lists them.
"use strict";
(() => {
  const { el } = paint;
  const state = { single: paint.stored("keys", true) };
  const KEYS = [
    ["1 to 6", "overview, evaluations, samples, answers, settings, log"],
    ["j, k", "next and previous sample or answers"],
    ["/", "search the samples or answers"],
    ["Enter", "from the list into the details"],
    ["Esc", "from the details back to the list"],
    ["g", "of a sample: the next response to its problem in its step; of answers: the next evaluation"],
    ["h", "colour the response by the next quantity"],
    ["arrow keys", "in the list: sample by sample; in the response: token by token"],
    ["m", "in the response: the next selected token"],
    ["t", "theme: of the system, light, dark"],
    ["?", "this list"],
  ];

  const dialog = document.getElementById("help");
  const build = () => {
    const single = el("input", { type: "checkbox", id: "single-keys", onchange: () => {
      state.single = single.checked;
      paint.store("keys", single.checked);
    } });
    single.checked = state.single;
    dialog.replaceChildren(
      el("h2", { id: "help-title", text: "Keys" }),
      el("dl", {}, ...KEYS.map(([key, what]) => el("div", {}, el("dt", {}, el("kbd", { text: key })), el("dd", { text: what })))),
      el("label", { class: "run", for: "single-keys" }, single, "Single-key shortcuts (lists and responses always have them)"),
      el("p", { class: "note", text: `megatron-paint ${paint.data.version}. Plots by uPlot (MIT). This page loads nothing from a network.` }),
      el("form", { method: "dialog" }, el("button", { text: "Close", onclick: (event) => {
        event.preventDefault();
        dialog.close();
      } })),
    );
  };
  const help = () => {
    if (dialog.open) return;
    build();
    dialog.showModal();
  };

  const views = ["overview", "evaluations", "samples", "answers", "settings", "log"];
  const viewer = () => paint.viewers[paint.view];
  const actions = {
    j: () => viewer().next(1),
    k: () => viewer().next(-1),
    g: () => viewer()?.nextAlike(),
    h: () => paint.nextQuantity?.(),
    t: () => paint.nextTheme(),
    "?": help,
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || dialog.open) return;
    const typing = event.target.closest?.("input, select, textarea");
    if (event.key === "Escape" && viewer() && !typing) {
      viewer().close();
      return;
    }
    if (typing || !state.single) return;
    if (/^[1-6]$/.test(event.key)) {
      location.hash = `#${views[Number(event.key) - 1]}`;
      paint.follow(); // now, for the next key; the event comes later
    } else if (event.key === "/") {
      if (!viewer()) paint.show("samples");
      document.getElementById(`${viewer().kind.prefix}search`).focus();
    } else if (event.key in actions) {
      if ("jk".includes(event.key) && !viewer()) paint.show("samples");
      actions[event.key]();
    } else return;
    event.preventDefault();
  });
  document.getElementById("help-open").addEventListener("click", help);
})();
