// Starts the page: views by address, theme, and the updates of a live report.
"use strict";
(() => {
  const { el } = paint;
  const POLL = 2000; // milliseconds between the questions of a live report
  const VIEWS = { overview: "Overview", evaluations: "Evaluations", samples: "Samples", answers: "Answers", settings: "Settings", log: "Log" };
  const SHOW = { overview: "showOverview", evaluations: "showEvaluations", settings: "showSettings", log: "showLog" };
  const THEMES = ["auto", "light", "dark"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Set(); // views that show the present data
  paint.view = "";

  const head = () => {
    const { runs, made, live } = paint.data;
    document.getElementById("title").textContent = paint.visible(runs.map((run) => run.name).join(", "));
    const last = runs.length === 1 ? `${runs[0].objective ?? "run"}, step ${paint.count(runs[0].last)}${runs[0].planned ? ` of ${paint.count(runs[0].planned)}` : ""}` : `${runs.length} runs`;
    const when = `${made.slice(0, 10)} ${made.slice(11, 16)} UTC`;
    document.getElementById("subtitle").textContent = `${last} · ${live ? "live, " : ""}${when}`;
    const links = Object.entries(VIEWS).map(([name, label]) => {
      const number = { samples: paint.data.samples.run.length, answers: paint.data.answers.run.length, log: runs.reduce((sum, run) => sum + paint.warnings(run), 0) }[name];
      const link = el("a", { href: `#${name}` }, label, number ? el("span", { class: "badge", text: paint.count(number) }) : null);
      if (name === paint.view) link.setAttribute("aria-current", "page");
      return el("li", {}, link);
    });
    document.getElementById("views").replaceChildren(...links);
  };

  paint.show = (name) => {
    if (!(name in VIEWS)) name = "overview";
    paint.view = name;
    for (const other of Object.keys(VIEWS)) document.getElementById(`view-${other}`).hidden = other !== name;
    document.body.dataset.view = name;
    head();
    const viewer = paint.viewers[name];
    if (drawn.has(name)) viewer?.update();
    else if (viewer) viewer.show();
    else paint[SHOW[name]](document.getElementById(`view-${name}`));
    drawn.add(name);
    if (viewer && !location.hash.startsWith(`#${name}`)) history.replaceState(null, "", `#${name}`);
  };

  // The samples of one step, or the answers of one evaluation.
  paint.showStep = (step, name = "samples") => {
    paint.viewers[name].onlyStep(step);
    drawn.delete(name); // its filters have other values
    location.hash = `#${name}`;
  };

  paint.follow = () => {
    const [name, run, page, place] = location.hash.slice(1).split("/");
    paint.show(name);
    if (place !== undefined) paint.viewers[paint.view]?.follow(run, decodeURIComponent(page), place);
  };

  const theme = () => {
    const chosen = paint.stored("theme", "auto");
    return THEMES.includes(chosen) ? chosen : "auto";
  };
  let current = theme();
  const setTheme = (name) => {
    current = name;
    document.documentElement.dataset.theme = name === "auto" ? (dark.matches ? "dark" : "light") : name;
    document.getElementById("theme").textContent = `Theme: ${name === "auto" ? "system" : name}`;
    paint.store("theme", name);
  };
  const redraw = () => {
    drawn.delete("overview");
    drawn.delete("evaluations");
    if (paint.view in SHOW) paint.show(paint.view);
  };
  paint.nextTheme = () => {
    setTheme(THEMES[(THEMES.indexOf(current) + 1) % THEMES.length]);
    redraw();
  };

  const shape = (rows) => Object.keys(rows).filter((name) => paint.known(rows, name)).join();
  const update = (data) => {
    const before = paint.data;
    paint.data = data;
    paint.forgetPages();
    for (const name of Object.keys(SHOW)) drawn.delete(name);
    const moved = {};
    for (const [name, viewer] of Object.entries(paint.viewers)) {
      const [old, now] = [before[name], data[name]];
      moved[name] = paint.movedRows(old, now);
      viewer.move(moved[name]);
      // A run was begun again, or has other columns.
      if (old.run.length > now.run.length || shape(old) !== shape(now)) drawn.delete(name);
    }
    paint.show(paint.view);
    for (const [name, viewer] of Object.entries(paint.viewers)) viewer.searchAgain(moved[name]);
  };

  const poll = async (stamp) => {
    try {
      const answer = await fetch("/data", { headers: stamp ? { "If-None-Match": stamp } : {}, cache: "no-store" });
      if (answer.status === 200) {
        const data = await answer.json();
        if (stamp !== null || data.samples.run.length !== paint.data.samples.run.length) update(data);
        stamp = answer.headers.get("ETag");
      }
      document.body.classList.remove("lost");
    } catch {
      document.body.classList.add("lost");
      paint.say("The server of this report does not answer.");
    }
    setTimeout(poll, POLL, stamp);
  };

  setTheme(current);
  document.getElementById("theme").addEventListener("click", paint.nextTheme);
  dark.addEventListener("change", () => {
    setTheme(current);
    redraw();
  });
  window.addEventListener("hashchange", paint.follow);
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("main details.prompt")) details.open = true;
    document.documentElement.dataset.theme = "light";
    redraw();
    paint.drawPlots(); // now, because a printed page is not observed
  });
  window.addEventListener("afterprint", () => {
    setTheme(current);
    redraw();
  });
  paint.follow();
  if (paint.data.live) poll(null);
  document.body.dataset.ready = "yes";
})();
