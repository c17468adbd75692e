// The answers of evaluations: a row for each problem of each evaluation, and its answers beside the reference.
"use strict";
(() => {
  const { el, count, counted, number, visible } = paint;
  const MOST_OPEN = 6000; // characters of answers that are shown at once; of longer ones the first is
  const OUTCOMES = {
    right: ["right", "right"], wrong: ["wrong", "wrong"], no_answer: ["no answer", "wrong"],
    timeout: ["time-out of the grader", "truncated"], error: ["the grader failed", "truncated"],
  };
  const VERDICT = { true: "right", false: "wrong" };

  const tags = (rows, index) => {
    const found = [];
    if (rows.share[index] === 1) found.push([rows.answers[index] > 1 ? "all right" : "right", "right"]);
    if (rows.share[index] === 0) found.push([rows.answers[index] > 1 ? "none right" : "wrong", "wrong"]);
    if (rows.cut_off[index]) found.push(["cut off", "truncated"]);
    return found;
  };

  const rightOf = (value, rows, index) => `${value}/${rows.answers[index]}`;
  const change = (value) => (value > 0 ? `+${number(100 * value, 3)}` : number(100 * value, 3)).replace("-", "−");

  const facts = (entry, index) => {
    const rows = paint.data.answers;
    const found = [["Right", `${rows.right[index]} of ${rows.answers[index]}`]];
    if (rows.greedy?.[index] !== undefined && rows.greedy[index] !== null) found.push(["Greedy answer", VERDICT[rows.greedy[index]]]);
    if (entry.reference !== undefined) found.push(["Reference answer", entry.reference]);
    found.push(["Since the first evaluation", `${change(rows.change[index])} points`]);
    if (rows.cut_off[index]) found.push(["Cut off", `${rows.cut_off[index]} of ${rows.answers[index]}`]);
    if (rows.tokens?.[index]) found.push(["Mean tokens", count(rows.tokens[index])]);
    if (entry.domain !== "math") found.push(["Domain", entry.domain]);
    return el("dl", { class: "sample-facts" }, ...found.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: visible(value) }))));
  };

  const problem = (entry) =>
    el("section", {}, el("h3", { text: "Problem" }),
      entry.problem === undefined
        ? el("p", { class: "note", text: "The run did not record its text." })
        : paint.plainText(entry.problem, "problem"));

  const answer = ({ sample, outcome, extracted, tokens, finished, text, error }, open) => {
    const found = [OUTCOMES[outcome] ?? [outcome, "out"], ...(finished ? [] : [["cut off", "truncated"]])];
    return el("details", { class: "prompt answer", open },
      el("summary", {},
        el("span", { text: sample < 0 ? "Greedy answer" : `Answer ${sample}` }), " ",
        el("span", { class: "tags" }, ...paint.tags(found)), " ",
        extracted === null ? null : el("code", { text: visible(extracted.slice(0, 200)) }),
        tokens ? el("span", { class: "unit", text: `${extracted === null ? "" : " · "}${counted(tokens, "token")}` }) : null),
      error ? el("p", { class: "note", text: visible(error) }) : null,
      paint.plainText(text, "answer"));
  };

  const answers = (entry) => {
    let shown = 0;
    const made = entry.answers.map((one, place) => answer(one, (shown += one.text.length) <= MOST_OPEN || place === 0));
    return el("section", {}, el("h3", { text: "Answers" }), ...made);
  };

  // This problem in all evaluations of the run on this benchmark.
  const alike = (index) => paint.alike(paint.data.answers, index, ["run", "benchmark", "id"]);
  const history = (index) => {
    const found = alike(index);
    if (found.length < 2) return null;
    return paint.groupTable(paint.viewers.answers, index, found, {
      title: "Over the run",
      unit: `${found.length} evaluations of this problem`,
      first: ["step", "Step"],
      columns: [
        ["right", "Right", rightOf], ["greedy", "Greedy", (value) => VERDICT[value] ?? "–"], ["change", "Change, points", change],
        ["tokens", "Mean tokens", count],
      ],
    });
  };

  const benchmarks = (rows) => [...new Set(rows.benchmark)].map((name) => [name, name]);

  paint.viewers.answers = paint.viewer({
    name: "answers",
    prefix: "answer-",
    detail: "answer",
    label: "Answers",
    counted: (number) => `${counted(number, "problem")} of evaluations`,
    one: "answer",
    empty: "Choose a problem from the list: with a click, or with the keys j and k.",
    none: "The runs have no evaluation with answers.",
    ranges: { step: "Step", share: "Share right", tokens: "Tokens" },
    sorts: { step: "step", share: "share right", change: "change since the first", tokens: "tokens", id: "problem" },
    down: new Set(["tokens"]),
    choices: {
      right: {
        label: "Answers", column: "share", options: [["all", "all right"], ["some", "some right"], ["none", "none right"]],
        passes: (chosen, share) => chosen === (share === 1 ? "all" : share === 0 ? "none" : "some"),
      },
      greedy: {
        label: "Greedy", column: "greedy", options: [["true", "right"], ["false", "wrong"]],
        passes: (chosen, greedy) => String(greedy) === chosen,
      },
      changed: {
        label: "Change", column: "change", options: [["better", "better"], ["same", "the same"], ["worse", "worse"]],
        passes: (chosen, value) => chosen === (value > 0 ? "better" : value < 0 ? "worse" : "same"),
      },
      cut: {
        label: "Cut off", column: "cut_off", options: [["some", "some answers"], ["none", "no answer"]],
        passes: (chosen, cut) => Boolean(cut) === (chosen === "some"),
      },
      benchmark: { label: "Benchmark", column: "benchmark", options: benchmarks, passes: (chosen, name) => name === chosen },
    },
    figures: { right: [52, rightOf], tokens: [56, count] },
    tags,
    aside: (rows, index, by) => (by === "change" ? `${change(rows.change[index])} points` : rows.benchmark[index]),
    where: (rows, index) => ` on ${rows.benchmark[index]}`,
    texts: (entry) => [entry.problem ?? "", entry.reference ?? "", ...entry.answers.map((one) => one.text)],
    alike,
    content: (entry, index) => [facts(entry, index), problem(entry), history(index), answers(entry)],
  });
})();
