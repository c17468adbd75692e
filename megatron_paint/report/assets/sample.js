// One sample: what the teacher saw of the solution, what the response has of it, the response, and both prompts.
"use strict";
(() => {
  const { el, number, fixed, count, counted, visible } = paint;
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
  const opened = { index: null, number: 0 };
  paint.openedSample = () => opened.index;

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
      ["overlap", "Overlap", fixed],
      ["reveal", "Reveal", fixed],
      ["reward", "Reward", fixed],
      ["advantage", "Advantage", fixed],
      ["loss", "Loss", (value) => `${number(value, 3)} nats a token`],
      ["tokens", "Tokens", count],
      ["selected", "Selected", count],
    ].filter(([name]) => paint.known(name, samples.run[index])).map(([name, label, text]) => [label, text(samples[name][index])]);
    if (entry.gap) facts.push(["Sampler gap, largest", `${number(entry.gap.largest, 3)} nats at token ${entry.gap.position + 1}`]);
    if (entry.domain && entry.domain !== "math") facts.push(["Domain", entry.domain]);
    if (entry.reveal?.hidden_nats !== undefined) facts.push(["Hidden", `${number(entry.reveal.hidden_nats, 3)} nats`]);
    if (entry.origin) facts.push(["Sampled by", `${entry.origin.engine} at ${entry.origin.server}, ${entry.origin.behind} steps behind`]);
    if (samples.left_out?.[index]) facts.push(["Left out", LEFT_OUT[samples.left_out[index]] ?? samples.left_out[index]]);
    return el("dl", { class: "sample-facts" }, ...facts.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: visible(value) }))));
  };

  // The other responses to the problem in this step, with what tells them apart.
  const group = (index) => {
    const { samples } = paint.data;
    const found = paint.group(index);
    if (found.length < 2) return null;
    const columns = [["reward", "Reward", fixed], ["advantage", "Advantage", fixed], ["overlap", "Overlap", fixed], ["tokens", "Tokens", count]]
      .filter(([name]) => paint.known(name, samples.run[index]));
    const rows = found.map((one) => [
      el("a", { href: `#${paint.addressOf(one)}`, "aria-current": one === index ? "true" : null, "aria-label": `sample ${samples.sample[one]}`, text: String(samples.sample[one]) }),
      el("span", { class: "tags" }, ...paint.tags(samples, one)),
      ...columns.map(([name, , text]) => text(samples[name][one])),
    ]);
    const right = found.filter((one) => samples.correct?.[one] === true).length;
    const unit = `${found.length} responses to this problem in this step${paint.known("correct", samples.run[index]) ? `, ${right} right` : ""}`;
    const heads = ["Sample", "", ...columns.map(([, label]) => label)];
    return el("section", { class: "group" }, el("h3", {}, "Group", el("span", { class: "unit", text: unit })),
      paint.table("Responses of the group", heads, rows, { numeric: columns.map((_, at) => at + 2), stack: false }));
  };
  paint.nextOfGroup = () => {
    if (opened.index === null) return;
    const found = paint.group(opened.index);
    const next = found[(found.indexOf(opened.index) + 1) % found.length];
    if (next !== opened.index) location.hash = `#${paint.addressOf(next)}`;
  };

  const head = (index) => {
    const { samples, runs } = paint.data;
    const run = runs.length > 1 ? `${runs[samples.run[index]].name}, ` : "";
    return el("header", {},
      el("div", { class: "titles" },
        el("h2", { text: visible(samples.id[index]) }),
        el("p", { class: "where", text: visible(`${run}step ${samples.step[index]}, sample ${samples.sample[index]}`) })),
      el("span", { class: "tags" }, ...paint.tags(samples, index)),
      el("div", { class: "steps" },
        el("button", { type: "button", class: "back", text: "List", onclick: () => paint.closeSample() }),
        el("button", { type: "button", text: "Previous", onclick: () => paint.nextSample(-1) }),
        el("button", { type: "button", text: "Next", onclick: () => paint.nextSample(1) })));
  };

  paint.openSample = async (index, { focus = false } = {}) => {
    const number = (opened.number += 1);
    opened.index = index;
    const place = document.getElementById("sample");
    document.getElementById("view-samples").classList.add("opened");
    const { samples } = paint.data;
    history.replaceState(null, "", `#${paint.addressOf(index)}`);
    let content;
    try {
      const entry = await paint.sample(index);
      if (paint.data.samples !== samples) { // a live report was updated meanwhile
        if (number === opened.number && opened.index !== null) paint.openSample(opened.index, { focus });
        return;
      }
      const { response, info } = paint.responseView(entry, { selects: paint.known("selected", samples.run[index]) });
      content = [head(index), factsOf(entry, index), group(index), el("div", { class: info ? "columns" : "" },
        el("div", {},
          el("section", {}, el("h3", { text: "Response" }), response),
          el("div", { class: "pair" }, ...[solution(entry), anchors(entry)].filter(Boolean)), prompts(entry)),
        info)];
    } catch (error) {
      content = [head(index), el("p", { class: "callout", role: "alert", text: `This sample cannot be shown: ${error.message}` })];
    }
    if (number !== opened.number) return; // another one was opened meanwhile
    const moved = place.contains(document.activeElement);
    const label = moved ? document.activeElement.textContent : "";
    place.replaceChildren(...content.filter(Boolean));
    place.scrollTop = 0;
    if (focus) place.focus();
    else if (moved) ([...place.querySelectorAll("header button, .group a")].find((one) => one.textContent === label) ?? place).focus();
    paint.say(`Problem ${samples.id[index]}, step ${samples.step[index]}`);
  };

  paint.moveOpened = (moved) => {
    if (opened.index !== null) opened.index = moved[opened.index] ?? null;
  };

  paint.closeSample = () => {
    document.getElementById("view-samples").classList.remove("opened");
    paint.updateList();
    paint.focusList();
  };

  paint.reopenSample = () => {
    if (opened.index !== null && opened.index < paint.data.samples.run.length) {
      paint.openSample(opened.index);
      paint.markInList(opened.index);
    }
  };

  paint.addressOf = (index) => {
    const { run, page, place } = paint.data.samples;
    return `samples/${run[index]}/${page[index]}/${place[index]}`;
  };
  // The sample of an address such as #samples/0/25_0/3.
  paint.sampleAt = (run, page, place) => {
    const { samples } = paint.data;
    for (let index = 0; index < samples.run.length; index += 1) {
      if (samples.run[index] === Number(run) && samples.page[index] === page && samples.place[index] === Number(place)) return index;
    }
    return null;
  };
})();
