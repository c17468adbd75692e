// One sample: what the teacher saw of the solution, what the response has of it, the response, and both prompts.
"use strict";
(() => {
  const { el, number, fixed, count, counted, visible } = paint;
  const two = (value) => fixed(value); // decimals
  const LEFT_OUT = {
    wrong: "its answer is not right",
    not_shortest: "a shorter response is right",
    no_peer: "no other right response can be shown",
    no_advantage: "its advantage is 0: its reward is the mean of its group",
  };
  const NOTHING_SHOWN = {
    none: "The teacher saw no solution.",
    reference_free: "The teacher saw no solution. Its prompt was in thinking mode.",
  };

  const whose = (reveal) => {
    const view = reveal.view ? ` (view ${reveal.view})` : "";
    switch (reveal.solution ?? "own") {
      case "wrong": return reveal.of === undefined ? `Solution${view}` : `Solution of problem ${reveal.of}${view}`;
      case "other_example": return `Worked example, problem ${reveal.of}${view}`;
      case "peer_rollout": return `Response ${reveal.peer} to this problem, in place of the solution`;
      default: return `Solution${view}`;
    }
  };

  const WORD = /[\p{L}\p{N}]/u;
  // Where an anchor occurs in the text as it is written; a part of a longer number or word does not count.
  const places = (text, anchors) => {
    const taken = [];
    const byLength = [...anchors].sort((a, b) => b[1].length - a[1].length);
    for (const [, wanted, found] of byLength) {
      if (!wanted) continue;
      for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + 1)) {
        const end = at + wanted.length;
        const cuts = (one, other) => one && other && WORD.test(one) && WORD.test(other);
        if (cuts(text[at - 1], text[at]) || cuts(text[end - 1], text[end])) continue;
        if (taken.some((other) => at < other.end && other.at < end)) continue;
        taken.push({ at, end, found });
        if (taken.length > 500) return taken.sort((a, b) => a.at - b.at);
      }
    }
    return taken.sort((a, b) => a.at - b.at);
  };

  const marked = (text, anchors, from = 0) => {
    const nodes = [];
    let at = 0;
    for (const place of places(text, anchors)) {
      nodes.push(visible(text.slice(at, place.at)));
      nodes.push(el("mark", { class: place.found ? "found" : "missing", text: visible(text.slice(place.at, place.end)) }));
      at = place.end;
    }
    nodes.push(visible(text.slice(at)));
    return nodes;
  };

  const nothingShown = ({ reveal }) => (reveal ? NOTHING_SHOWN[reveal.solution] : "This objective shows no solution to a teacher.");
  const MOST = 100000; // characters of a solution whose anchors are marked
  const solution = (entry) => {
    const { reveal } = entry;
    if (nothingShown(entry)) return el("section", {}, el("h3", { text: "Solution" }), el("p", { class: "note", text: nothingShown(entry) }));
    const [shown, reference] = [reveal.shown_text ?? "", reveal.reference_text ?? ""];
    const title = el("h3", {}, visible(whose(reveal)), el("span", { class: "unit", text: `${count(reveal.shown_tokens)} of ${counted(reveal.total_tokens, "token")} shown` }));
    const parts = [];
    if (reveal.example) parts.push(el("pre", { class: "text", text: visible(reveal.example) }));
    if (!reference.startsWith(shown) || reference.length > MOST) {
      parts.push(el("h4", { text: "Shown" }), paint.plainText(shown, "shown text"));
      parts.push(el("h4", { text: "Complete" }), paint.plainText(reference, "solution"));
    } else {
      const hidden = reference.slice(shown.length);
      const text = el("pre", { class: "text solution" }, ...marked(shown, entry.anchors));
      if (hidden) {
        text.append(el("span", { class: "cut" }, el("span", { class: "hidden-text", text: " (from here on hidden from the teacher:) " }), ...marked(hidden, entry.anchors)));
      }
      parts.push(text);
      parts.push(el("p", { class: "key" },
        el("span", { text: "shown" }), el("span", { class: "cut", text: "hidden" }),
        el("mark", { class: "found", text: "anchor in the response" }), el("mark", { class: "missing", text: "anchor missing" })));
    }
    const bar = el("div", { class: "reveal-bar", "aria-hidden": "true" }, el("span", {}));
    bar.firstChild.style.width = `${reveal.total_tokens ? (100 * reveal.shown_tokens) / reveal.total_tokens : 0}%`;
    return el("section", {}, title, bar, ...parts);
  };

  const anchors = (entry) => {
    if (!entry.anchors.length && nothingShown(entry)) return null;
    const found = entry.anchors.filter((anchor) => anchor[2]);
    const missing = entry.anchors.filter((anchor) => !anchor[2]);
    const group = (name, list, kind) =>
      list.length
        ? el("div", { class: "anchors" }, el("h4", { text: `${name} (${list.length})` }), el("ul", {}, ...list.map(([what, text]) =>
            el("li", { class: kind }, el("code", { text: visible(text) }), el("span", { class: "what", text: visible(what) })))))
        : null;
    if (!entry.anchors.length) return el("section", {}, el("h3", { text: "Anchors" }), el("p", { class: "note", text: "The solution has none." }));
    return el("section", {}, el("h3", {}, "Anchors", el("span", { class: "unit", text: `${found.length} of ${entry.anchors.length} in the response` })),
      group("Found", found, "found"), group("Missing", missing, "missing"));
  };

  const prompts = (entry) => {
    if (!entry.prompts) return null;
    const made = Object.entries(entry.prompts).map(([side, text]) => el("details", { class: "prompt" }, el("summary", { text: `Prompt of the ${side}` }), paint.plainText(text, "prompt")));
    return made.length ? el("section", {}, el("h3", { text: "Prompts" }), ...made) : null;
  };

  const factsOf = (entry, index) => {
    const { samples } = paint.data;
    const facts = [
      ["overlap", "Overlap", two],
      ["reveal", "Reveal", two],
      ["reward", "Reward", two],
      ["advantage", "Advantage", two],
      ["loss", "Loss", (value) => `${number(value, 3)} nats a token`],
      ["tokens", "Tokens", count],
      ["selected", "Selected", count],
    ].filter(([name]) => paint.known(samples, name, samples.run[index])).map(([name, label, text]) => [label, text(samples[name][index])]);
    if (entry.gap) facts.push(["Sampler gap, largest", `${number(entry.gap.largest, 3)} nats at token ${entry.gap.position + 1}`]);
    if (entry.domain && entry.domain !== "math") facts.push(["Domain", entry.domain]);
    if (entry.reveal?.hidden_nats !== undefined) facts.push(["Hidden", `${number(entry.reveal.hidden_nats, 3)} nats`]);
    if (entry.origin) facts.push(["Sampled by", `${entry.origin.engine} at ${entry.origin.server}, ${entry.origin.behind} steps behind`]);
    if (samples.left_out?.[index]) facts.push(["Left out", LEFT_OUT[samples.left_out[index]] ?? samples.left_out[index]]);
    return el("dl", { class: "sample-facts" }, ...facts.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: visible(value) }))));
  };

  // The responses to the problem of this sample in its step.
  const alike = (index) => paint.alike(paint.data.samples, index, ["run", "step", "id"]);
  const group = (index) => {
    const { samples } = paint.data;
    const found = alike(index);
    if (found.length < 2) return null;
    const right = found.filter((one) => samples.correct?.[one] === true).length;
    const graded = paint.known(samples, "correct", samples.run[index]);
    return paint.groupTable(paint.viewers.samples, index, found, {
      title: "Group",
      unit: `${found.length} responses to this problem in this step${graded ? `, ${right} right` : ""}`,
      first: ["sample", "Sample"],
      columns: [["reward", "Reward", two], ["advantage", "Advantage", two], ["overlap", "Overlap", two], ["tokens", "Tokens", count]],
    });
  };

  const content = (entry, index) => {
    const { samples } = paint.data;
    const { response, info } = paint.responseView(entry, { selects: paint.known(samples, "selected", samples.run[index]) });
    return [factsOf(entry, index), group(index), el("div", { class: info ? "columns" : "" },
      el("div", {},
        el("section", {}, el("h3", { text: "Response" }), response),
        el("div", { class: "pair" }, ...[solution(entry), anchors(entry)].filter(Boolean)), prompts(entry)),
      info)];
  };

  // What the list is sorted by, where it is in no column; else the number of tokens.
  const aside = (samples, index, by) => {
    if (by === "selected") return `${count(samples.selected[index])} selected`;
    return by === "gap" ? `gap ${number(samples.gap[index], 2)}` : counted(samples.tokens[index], "token");
  };

  const tags = (samples, index) => {
    const found = [];
    if (samples.correct?.[index] === true) found.push(["right", "right"]);
    if (samples.correct?.[index] === false) found.push(["wrong", "wrong"]);
    if (samples.finished?.[index] === false) found.push(["cut off", "truncated"]);
    if (samples.left_out?.[index]) found.push(["left out", "out"]);
    return found;
  };

  paint.viewers.samples = paint.viewer({
    name: "samples",
    prefix: "",
    detail: "sample",
    label: "Samples",
    counted: (number) => counted(number, "sample"),
    one: "sample",
    empty: "Choose a sample from the list: with a click, or with the keys j and k.",
    none: "The runs have no samples.",
    ranges: {
      step: "Step", overlap: "Overlap", reveal: "Reveal", reward: "Reward", advantage: "Advantage", loss: "Loss", tokens: "Tokens",
    },
    sorts: {
      step: "step", loss: "loss", overlap: "overlap", reveal: "reveal", reward: "reward", advantage: "advantage",
      tokens: "tokens", selected: "selected tokens", gap: "sampler gap", id: "problem",
    },
    down: new Set(["reward", "advantage", "loss", "tokens", "selected", "gap"]),
    choices: {
      ended: {
        label: "Ended", column: "finished", options: [["whole", "complete"], ["cut", "cut off"]],
        passes: (chosen, finished) => finished === (chosen === "whole"),
      },
      answer: {
        label: "Answer", column: "correct", options: [["right", "right"], ["wrong", "wrong"], ["none", "not graded"]],
        passes: (chosen, correct) => (chosen === "none" ? typeof correct !== "boolean" : correct === (chosen === "right")),
      },
      trained: {
        label: "Trained on", column: "left_out", options: [["yes", "yes"], ["no", "left out"]],
        passes: (chosen, left) => Boolean(left) === (chosen === "no"),
      },
    },
    figures: {
      overlap: [48, two], reveal: [48, two], reward: [52, two], advantage: [68, two], loss: [52, (value) => number(value, 3)],
    },
    tags,
    aside,
    where: (samples, index) => `, sample ${samples.sample[index]}`,
    texts: (entry) => [entry.text, entry.reveal?.reference_text ?? "", ...Object.values(entry.prompts ?? {})],
    alike,
    content,
  });
})();
