// The overview: the runs, their curves and the time of their phases; and the evaluations.
"use strict";
(() => {
  const { el, number, percent, count, counted, figure, smooth, lineColor, runLine, DASHES, isNumber } = paint;
  const MOST_BARS = 80; // of the phases; longer runs show means over several steps
  const MOST_TOGETHER = 3; // runs whose plots have several series each; with more runs a plot has one series
  const state = {
    smoothing: paint.stored("smoothing", 0),
    scale: paint.stored("scale", "auto"),
    hidden: new Set(), // numbers of runs
  };

  const runs = () => paint.data.runs.map((run, index) => ({ ...run, index }));
  const shownRuns = () => runs().filter((run) => !state.hidden.has(run.index));
  const stateOf = (run) => {
    if (run.finished) return `finished, ${counted(run.last, "step")}`;
    const step = `step ${count(run.last)}${run.planned ? ` of ${count(run.planned)}` : ""}`;
    const last = run.events.at(-1);
    const ended = last?.kind === "end" && last.start === run.starts.length && !last.text.startsWith("skipped ");
    return ended ? `stopped, ${step}` : step;
  };

  paint.warnings = (run) => run.events.filter((event) => event.kind === "warning").length;

  const accuracy = (evaluation) =>
    `${percent(evaluation.avg)} [${(100 * evaluation.low).toFixed(1)}, ${(100 * evaluation.high).toFixed(1)}]`;

  const runsTable = () => {
    const heads = ["Run", "Objective", "State", "Response tokens", "Loss, last", "Before", "After", "Warnings"];
    const rows = runs().map((run) => {
      const losses = (run.metrics.loss ?? []).filter(isNumber);
      const [first, last] = [run.evaluations[0], run.evaluations.at(-1)];
      const warnings = paint.warnings(run);
      return [
        runName(run),
        run.objective ?? "–",
        stateOf(run),
        count(run.tokens),
        number(losses.at(-1)),
        first ? accuracy(first) : "–",
        last && last !== first ? accuracy(last) : "–",
        warnings ? el("a", { href: "#log", text: String(warnings) }) : "0",
      ];
    });
    return paint.table("Runs", heads, rows, { numeric: [3, 4, 5, 6, 7] });
  };

  const runName = (run) => {
    if (paint.data.runs.length === 1) return el("span", { text: paint.visible(run.name) });
    const box = el("input", { type: "checkbox", id: `run-${run.index}`, onchange: () => {
      if (box.checked) state.hidden.delete(run.index);
      else state.hidden.add(run.index);
      drawCurves();
    } });
    box.checked = !state.hidden.has(run.index);
    const mark = el("span", { class: "dot", "aria-hidden": "true" });
    mark.style.backgroundColor = lineColor(run.index);
    return el("label", { class: "run" }, box, mark, paint.visible(run.name));
  };

  const facts = () => {
    const list = el("dl", { class: "facts" });
    for (const run of runs()) {
      for (const [name, text] of Object.entries(run.facts)) {
        const title = paint.data.runs.length > 1 ? `${run.name}: ${name}` : name;
        list.append(el("div", {}, el("dt", { text: paint.visible(title) }), el("dd", { text: paint.visible(text) })));
      }
    }
    if (!list.childElementCount) return null;
    return el("details", { class: "about" }, el("summary", { text: "Model, layout and memory, as the start printed them" }), list);
  };

  const notices = () => {
    const lines = runs().flatMap((run) => run.notices.map((text) => [run, text]));
    if (!lines.length) return null;
    const name = (run) => (paint.data.runs.length > 1 ? `${run.name}: ` : "");
    return el(
      "div",
      { class: "callout", role: "note" },
      el("strong", { text: "Not everything could be read." }),
      el("ul", {}, ...lines.map(([run, text]) => el("li", { text: paint.visible(name(run) + text) }))),
    );
  };

  const controls = () => {
    const value = el("output", { for: "smoothing", text: state.smoothing.toFixed(2) });
    const smoothing = el("input", { type: "range", min: "0", max: "0.98", step: "0.02", oninput: () => {
      state.smoothing = Number(smoothing.value);
      value.textContent = state.smoothing.toFixed(2);
      paint.store("smoothing", state.smoothing);
      drawCurves();
    } });
    smoothing.value = state.smoothing;
    const scale = paint.select(
      [["auto", "automatic"], ["linear", "linear"], ["log", "logarithmic"]],
      state.scale,
      (chosen) => {
        state.scale = chosen;
        paint.store("scale", chosen);
        drawCurves();
      },
    );
    const first = paint.field("Smoothing", smoothing, "smoothing");
    first.append(value);
    return el("div", { class: "controls" }, first, paint.field("Scale", scale, "scale"));
  };

  // All steps of the shown runs, and for a series of a run its value at each of them.
  const together = (chosen) => {
    const steps = [...new Set(chosen.flatMap((run) => run.steps))].sort((a, b) => a - b);
    const place = new Map(steps.map((step, index) => [step, index]));
    const at = (run, key) => {
      const values = new Array(steps.length).fill(null);
      const own = run.metrics[key] ?? [];
      run.steps.forEach((step, index) => (values[place.get(step)] = own[index] ?? null));
      return values;
    };
    return { steps, at };
  };

  const curve = (plot, chosen, { steps, at }) => {
    const lines = [];
    const several = paint.data.runs.length > 1;
    for (const run of chosen) {
      plot.series.forEach((series, index) => {
        if (!(series.key in run.metrics)) return;
        const raw = at(run, series.key);
        const label = several ? (plot.series.length > 1 ? `${run.name}: ${series.label}` : run.name) : series.label;
        // One run: a colour for each series. Several: a colour for each run, and a dash for each series.
        const dash = DASHES[index % DASHES.length];
        const ofRun = plot.series.length > 1 ? { ...runLine(run.index), dash } : runLine(run.index);
        const style = several ? ofRun : { stroke: lineColor(index), dash };
        lines.push({ label, values: smooth(raw, state.smoothing), ...style });
        if (state.smoothing && !several) lines.push({ label: `${label}, not smoothed`, values: raw, stroke: faint(style.stroke), width: 1 });
      });
    }
    if (!lines.length) return null;
    const log = state.scale === "log" || (state.scale === "auto" && plot.log);
    const meaning = plot.series.map((series) => paint.data.meanings[series.key]).filter(Boolean).join("\n");
    const share = (plot.share || plot.zero) && !log;
    const open = paint.data.samples.run.length ? (step) => paint.showStep(step) : null;
    return figure({ title: plot.title, unit: plot.unit, share, log, meaning, open }, steps, lines);
  };

  const faint = (stroke) => `${stroke}59`; // with 35 % opacity

  const phaseName = (key) => key.replace("time/", "").replace(/_s$/, "");

  // Means of groups of steps, so that the bars stay apart.
  const grouped = (steps, values) => {
    const size = Math.max(1, Math.ceil(steps.length / MOST_BARS));
    const starts = steps.filter((_, index) => index % size === 0);
    const means = (list) =>
      starts.map((_, group) => {
        const part = list.slice(group * size, (group + 1) * size).filter(isNumber);
        return part.length ? part.reduce((sum, value) => sum + value, 0) / part.length : 0;
      });
    return { size, starts, parts: values.map(means) };
  };

  const phases = (run) => {
    if (!run.phases.length || !run.steps.length) return null;
    const names = run.phases.map(phaseName);
    const { size, starts, parts } = grouped(run.steps, run.phases.map((key) => run.metrics[key]));
    const sums = [];
    parts.forEach((part, index) => sums.push(part.map((value, at) => value + (index ? sums[index - 1][at] : 0))));
    // The tallest bar first: each later one covers the lower part of it.
    const lines = names
      .map((name, index) => ({ label: name, values: sums[index], shown: parts[index], fill: lineColor(index), stroke: lineColor(index), width: 0 }))
      .reverse();
    const total = run.phases.map((key) => run.metrics[key].filter(isNumber).reduce((sum, value) => sum + value, 0));
    const all = total.reduce((sum, value) => sum + value, 0) || 1;
    const note = total.map((value, index) => `${names[index]} ${percent(value / all, 0)}`).join(", ");
    return figure(
      {
        title: paint.data.runs.length > 1 ? `Time by phase: ${run.name}` : "Time by phase",
        unit: size > 1 ? `seconds a step, means of ${size} steps` : "seconds a step",
        bars: size / 2 + 0.5,
        height: 200,
        class: "wide",
        note: `Of all steps: ${note}.`,
      },
      starts,
      lines,
    );
  };

  // The legend of many runs with several series each would be longer than the plot.
  const plotsFor = (chosen) =>
    chosen.length <= MOST_TOGETHER
      ? paint.data.plots
      : paint.data.plots.flatMap((plot) =>
          plot.series.length === 1 ? [plot] : plot.series.map((one) => ({ ...plot, title: `${plot.title}: ${one.label}`, series: [one] })));

  const drawCurves = () => {
    const place = document.getElementById("curves");
    const open = place.querySelector("details.more")?.open;
    paint.clearPlots(place);
    const chosen = shownRuns();
    const data = together(chosen);
    const [usual, more] = [false, true].map((kind) =>
      plotsFor(chosen).filter((plot) => plot.more === kind).map((plot) => curve(plot, chosen, data)).filter(Boolean),
    );
    const rest = more.length
      ? el("details", { class: "more" }, el("summary", { text: `More metrics (${more.length})` }), el("div", { class: "grid" }, ...more))
      : null;
    if (rest && open) rest.open = true;
    const bars = chosen.map(phases).filter(Boolean);
    place.replaceChildren(
      ...(usual.length ? [el("div", { class: "grid" }, ...usual)] : [el("p", { class: "empty", text: "No step has been recorded." })]),
      ...(bars.length ? [el("div", { class: "grid" }, ...bars)] : []),
      ...(rest ? [rest] : []),
    );
  };

  paint.showOverview = (view) => {
    paint.clearPlots(view);
    view.replaceChildren(
      ...[notices(), el("div", { class: "panel" }, runsTable(), facts()), controls(), el("div", { id: "curves" })].filter(Boolean),
    );
    drawCurves();
  };

  // Error bars of evaluations, drawn on the canvas of the plot.
  const whiskers = (lines) => (uplot) => {
    const { ctx } = uplot;
    ctx.save();
    lines.forEach((line) => {
      ctx.strokeStyle = line.stroke;
      ctx.lineWidth = 1.5 * devicePixelRatio;
      uplot.data[0].forEach((step, at) => {
        if (!isNumber(line.low[at])) return;
        const there = lines.filter((one) => isNumber(one.low[at])); // those at one step stand side by side
        const shift = (there.indexOf(line) - (there.length - 1) / 2) * 5 * devicePixelRatio;
        const x = uplot.valToPos(step, "x", true) + shift;
        const [low, high] = [line.low[at], line.high[at]].map((value) => uplot.valToPos(value, "y", true));
        const cap = 4 * devicePixelRatio;
        ctx.beginPath();
        ctx.moveTo(x, low);
        ctx.lineTo(x, high);
        for (const end of [low, high]) {
          ctx.moveTo(x - cap, end);
          ctx.lineTo(x + cap, end);
        }
        ctx.stroke();
      });
    });
    ctx.restore();
  };

  const accuracyPlot = (benchmark) => {
    const chosen = runs().filter((run) => run.evaluations.some((one) => one.benchmark === benchmark));
    const of = (run) => run.evaluations.filter((one) => one.benchmark === benchmark);
    const steps = [...new Set(chosen.flatMap((run) => of(run).map((one) => one.step)))].sort((a, b) => a - b);
    const lines = chosen.map((run) => {
      const at = new Map(of(run).map((one) => [one.step, one]));
      const pick = (name) => steps.map((step) => (at.has(step) ? 100 * at.get(step)[name] : null));
      const label = paint.data.runs.length > 1 ? run.name : `Avg@${of(run)[0].n}`;
      return { label, values: pick("avg"), low: pick("low"), high: pick("high"), ...(paint.data.runs.length > 1 ? runLine(run.index) : { stroke: lineColor(0) }) };
    });
    const low = Math.min(...lines.flatMap((line) => line.low.filter(isNumber)));
    const high = Math.max(...lines.flatMap((line) => line.high.filter(isNumber)));
    const pad = Math.max((high - low) * 0.08, 1);
    return figure(
      {
        title: `Accuracy on ${benchmark}`,
        unit: "%, with 95 % intervals over problems",
        height: 260,
        class: "wide",
        points: true,
        pad: Math.max(0.5, (steps.at(-1) - steps[0]) * 0.03),
        sync: "evaluations",
        range: [Math.max(0, low - pad), Math.min(100, high + pad)],
        hooks: { draw: [whiskers(lines)] },
      },
      steps,
      lines,
    );
  };

  const difference = (found) =>
    found && found[1] !== null ? `${found[0] >= 0 ? "+" : ""}${(100 * found[0]).toFixed(1)} [${(100 * found[1]).toFixed(1)}, ${(100 * found[2]).toFixed(1)}]` : "–";

  const stepLink = ({ step }) =>
    paint.data.answers.step.includes(step)
      ? el("button", { type: "button", class: "link", "aria-label": `answers of step ${step}`, text: String(step), onclick: () => paint.showStep(step, "answers") })
      : String(step);

  const evaluationsTable = () => {
    const several = paint.data.runs.length > 1;
    const heads = [...(several ? ["Run"] : []), "Step", "Benchmark", "Problems", "n", "Accuracy, %", "Difference from the first, points", "Greedy", "pass@n", "maj@n", "Cut off", "Mean tokens"];
    const rows = runs().flatMap((run) =>
      run.evaluations.map((one) => [
        ...(several ? [run.name] : []),
        stepLink(one), one.benchmark, count(one.problems), String(one.n), accuracy(one).replace(" %", ""),
        one === run.evaluations[0] ? "–" : difference(one.difference),
        percent(one.greedy), percent(one.pass), percent(one.maj), percent(one.truncated), number(one.length),
      ]),
    );
    const from = several ? 3 : 2;
    return paint.table("Evaluations", heads, rows, { numeric: heads.map((_, index) => index).filter((index) => index >= from || index === from - 2) });
  };

  const domains = () => {
    const rows = runs().flatMap((run) =>
      run.evaluations.flatMap((one) => one.domains.map((domain) => [run.name, String(one.step), one.benchmark, domain.name, accuracy(domain)])),
    );
    return rows.length ? el("div", { class: "panel" }, el("h2", { text: "By domain" }), paint.table("Accuracy by domain", ["Run", "Step", "Benchmark", "Domain", "Accuracy"], rows, { numeric: [1, 4] })) : null;
  };

  paint.showEvaluations = (view) => {
    paint.clearPlots(view);
    const names = [...new Set(runs().flatMap((run) => run.evaluations.map((one) => one.benchmark)))];
    if (!names.length) {
      view.replaceChildren(el("p", { class: "empty", text: "These runs have no evaluation." }));
      return;
    }
    view.replaceChildren(
      ...[
        el("div", { class: "grid" }, ...names.map(accuracyPlot)),
        el("div", { class: "panel" }, evaluationsTable()),
        domains(),
        el("p", { class: "note", text: "Accuracy is Avg@n: the share of right answers, of n answers to each problem. Intervals are over the draw of problems. The difference is paired by problem, which makes its interval narrower." }),
      ].filter(Boolean),
    );
  };
})();
