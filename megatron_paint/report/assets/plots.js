// Plots by uPlot. Each has a legend of real text, a label for screen readers, and a table of its numbers.
"use strict";
(() => {
  const { el, number, color, isNumber } = paint;
  const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [4, 2], [12, 4]];
  const LINES = 8; // colours of the palette
  const WIDTH = 1.6; // of a line
  const FONT = '11px system-ui, "Segoe UI", sans-serif';
  const HEIGHT = 190;
  const SMALLEST = 1e-12;
  const FEW = 30; // steps whose values are drawn as points
  const STILL = 4; // pixels between press and release of a click; a longer way is a zoom
  const DOUBLE = 300; // milliseconds in which a second click makes a double click, which ends a zoom
  const drawn = new Set(); // plots that exist, to draw again in another theme or width

  const lineColor = (index) => color(`line-${index % LINES}`);
  // Of run number `index`: no two of 48 runs have the same line. Runs with the same colour have other dashes and widths.
  const runLine = (index) => {
    const again = Math.floor(index / LINES);
    return { stroke: lineColor(index), dash: DASHES[(index + again) % DASHES.length], width: WIDTH * (1 + 0.6 * again) };
  };

  // Exponential moving average; weight 0 is no smoothing. The first value starts it, so there is no bias to 0.
  const smooth = (values, weight) => {
    if (!weight) return values;
    let mean = null;
    return values.map((value) => {
      if (!isNumber(value)) return null;
      mean = mean === null ? value : weight * mean + (1 - weight) * value;
      return mean;
    });
  };

  const WHOLE = [1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7].flatMap((power) => [power, 2 * power, 5 * power]);
  const isPower = (value) => Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-9;
  // Of a logarithmic scale only the powers of ten.
  const powers = (log) => (_, ticks) => (log ? ticks.map((value) => (isPower(value) ? value : null)) : ticks);
  // So many significant digits that neighbouring ticks differ.
  const tickDigits = (value, step) =>
    value && step ? Math.max(3, Math.floor(Math.log10(Math.abs(value))) - Math.floor(Math.log10(step)) + 2) : 3;
  const axes = (log) => [
    {
      stroke: color("muted"),
      font: FONT,
      grid: { show: false },
      ticks: { stroke: color("rule"), size: 4 },
      size: 22,
      label: "step",
      labelSize: 14,
      labelGap: 0,
      labelFont: FONT,
      incrs: WHOLE, // steps are whole numbers
    },
    {
      stroke: color("muted"),
      font: FONT,
      grid: { stroke: color("rule"), width: 1, filter: powers(log) },
      ticks: { show: false },
      size: 54,
      filter: powers(log),
      values: (_, ticks, axis, space, step) =>
        ticks.map((value) => (value === null ? "" : number(value, log ? 3 : tickDigits(value, step)))),
    },
  ];

  const swatch = (line) => {
    const mark = el("canvas", { class: "swatch", width: 44, height: 8, "aria-hidden": "true" });
    const context = mark.getContext("2d");
    context.strokeStyle = line.fill ? "transparent" : line.stroke;
    context.lineWidth = Math.min(8, 2.5 * (line.width ?? WIDTH));
    context.setLineDash((line.dash ?? []).map((part) => part * 2));
    context.beginPath();
    context.moveTo(0, 4);
    context.lineTo(44, 4);
    context.stroke();
    if (line.fill) {
      context.fillStyle = line.fill;
      context.fillRect(0, 0, 44, 8);
    }
    return mark;
  };

  // lines: [{label, values, shown?, stroke, dash?, fill?}] over the same x. Returns a figure.
  // options: title, unit, log, share, note, table (heads and rows, lazily), hooks, bars, y (function of lines),
  // open (what a click on a step does)
  const figure = (options, x, lines) => {
    const legend = el("ul", { class: "legend" });
    const entries = lines.map((line) => {
      const value = el("span", { class: "value" });
      legend.append(el("li", {}, swatch(line), el("span", { text: line.label }), value));
      return value;
    });
    const place = el("div", { class: options.open ? "plot opens" : "plot" });
    place.style.height = `${options.height ?? HEIGHT}px`;
    const show = (index) => {
      lines.forEach((line, at) => {
        const values = line.shown ?? line.values;
        let chosen = index;
        if (chosen === null) for (chosen = values.length - 1; chosen > 0 && !isNumber(values[chosen]);) chosen -= 1;
        entries[at].textContent = number(values[chosen]);
      });
      stepText.textContent = index === null ? "last" : `${options.xName ?? "step"} ${x[index]}`;
    };
    const stepText = el("span", { class: "at" });
    const named = [options.title, options.unit].filter(Boolean).join(", ");
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", `${named}: ${lines.map((line) => summary(line)).join("; ")}`);
    const details = el("details", { class: "numbers" }, el("summary", { text: "Numbers" }));
    details.addEventListener("toggle", () => {
      if (!details.open || details.childElementCount > 1) return;
      details.append(numbersTable(options, x, lines));
    });
    const made = el(
      "figure",
      { class: options.class ?? "" },
      el(
        "figcaption",
        {},
        el("h3", { text: options.title }),
        el("span", { class: "unit", text: options.unit ?? "" }),
        stepText,
      ),
      legend,
      place,
      options.note ? el("p", { class: "note", text: options.note }) : null,
      details,
    );
    if (options.meaning) made.querySelector("h3").title = options.meaning;
    if (options.open) place.title = "A click lists the samples of the step.";
    show(null);
    const plot = { place, options, x, lines, show, uplot: null };
    drawn.add(plot);
    observer.observe(place);
    return made;
  };

  const summary = (line) => {
    const values = (line.shown ?? line.values).filter(isNumber);
    if (!values.length) return `${line.label} has no values`;
    return `${line.label} from ${number(values[0])} to ${number(values.at(-1))}`;
  };

  const numbersTable = (options, x, lines) => {
    const heads = [options.xName ?? "step", ...lines.map((line) => line.label)];
    const first = (step) => {
      if (!options.open) return String(step);
      return el("button", { type: "button", class: "link", "aria-label": `samples of step ${step}`, onclick: () => options.open(step), text: String(step) });
    };
    const rows = x.map((step, index) => [
      first(step),
      ...lines.map((line) => number((line.shown ?? line.values)[index])),
    ]);
    return paint.table(`${options.title}: numbers`, heads, rows, { numeric: heads.map((_, index) => index), stack: false });
  };

  const draw = (plot) => {
    const width = Math.floor(plot.place.clientWidth);
    if (width < 40) return;
    if (plot.uplot) plot.uplot.destroy();
    const { options } = plot;
    const log = options.log && plot.lines.some((line) => line.values.some((value) => value > 0));
    // A logarithmic scale has at most so many powers of ten, from the largest value on.
    const largest = Math.max(...plot.lines.map((line) => line.values.reduce((most, v) => (v > most ? v : most), 0)));
    const values = plot.lines.map((line) =>
      log
        ? line.values.map((value) => (value > largest * SMALLEST ? value : null))
        : line.values.map((value) => (isNumber(value) ? value : null)),
    );
    const few = plot.x.length < FEW;
    const series = plot.lines.map((line) => ({
      stroke: line.stroke,
      fill: line.fill,
      width: line.width ?? WIDTH,
      dash: line.dash,
      spanGaps: true,
      points: { show: options.bars ? false : options.points ?? few, size: 5, fill: line.stroke, width: 0 },
      paths: options.bars ? uPlot.paths.bars({ size: [0.86, 48], gap: 0 }) : undefined,
    }));
    plot.uplot = new uPlot(
      {
        width,
        height: options.height ?? HEIGHT,
        padding: [8, 10, 0, 0],
        legend: { show: false },
        cursor: {
          sync: { key: options.sync ?? "steps" },
          drag: { x: !options.bars, y: false },
          points: { show: !options.bars, size: 7 },
        },
        scales: { x: { time: false, range: xRange(plot) }, y: yScale(options, log) },
        axes: axes(log),
        series: [{}, ...series],
        hooks: {
          setCursor: [(uplot) => plot.show(uplot.cursor.idx ?? null)],
          ...(options.hooks ?? {}),
        },
      },
      [plot.x, ...values],
      plot.place,
    );
    if (options.open) openOnClick(plot);
  };

  const openOnClick = (plot) => {
    const { over, cursor } = plot.uplot;
    let pressed = 0;
    let timer = 0;
    over.addEventListener("mousedown", (event) => (pressed = event.clientX));
    over.addEventListener("dblclick", () => clearTimeout(timer));
    over.addEventListener("click", (event) => {
      clearTimeout(timer);
      if (Math.abs(event.clientX - pressed) > STILL || !isNumber(cursor.idx)) return;
      timer = setTimeout(plot.options.open, DOUBLE, plot.x[cursor.idx]);
    });
  };

  const xRange = (plot) => (uplot, low, high) => {
    const { bars, pad: wanted } = plot.options;
    // Points at the edge would cover the numbers of the axis.
    const least = bars ?? wanted ?? (plot.x.length < FEW ? 0 : null);
    const pad = least === null ? 0 : Math.max((high - low) * 0.03, least);
    return low === high ? [low - 1, high + 1] : [low - pad, high + pad];
  };

  const yScale = (options, log) => {
    if (log) return { distr: 3, log: 10 };
    if (options.range) return { range: options.range };
    if (options.share) return { range: (_, low, high) => [Math.min(0, low), Math.max(high * 1.08, 0.02)] };
    if (options.bars) return { range: (_, low, high) => [0, high * 1.05 || 1] };
    return {};
  };

  const observer = new ResizeObserver((entries) => {
    for (const entry of entries) {
      for (const plot of drawn) if (plot.place === entry.target) draw(plot);
    }
  });

  paint.clearPlots = (within) => {
    for (const plot of drawn) {
      if (within && !within.contains(plot.place)) continue;
      observer.unobserve(plot.place);
      if (plot.uplot) plot.uplot.destroy();
      drawn.delete(plot);
    }
  };
  paint.drawPlots = () => drawn.forEach(draw);
  Object.assign(paint, { figure, smooth, lineColor, runLine, DASHES });
})();
