// The response token by token: a heat map of one quantity, and what is known of the token under the cursor.
"use strict";
(() => {
  const { el, number, visible, isNumber, percent } = paint;
  const LEVELS = 8;
  const MOST_TOKENS = 6000; // that are drawn before the reader asks for all
  const MOST_CHARACTERS = 100000;
  const SIGNED = new Set(["logprob_gap", "entropy_gap"]);
  const state = { quantity: paint.stored("quantity", "divergence") };

  // selects: whether the run selects tokens.
  const quantitiesOf = (entry, selects) => {
    const found = Object.entries(paint.data.quantities).filter(([name]) => name in entry.values);
    const { student_entropy: student, teacher_entropy: teacher } = entry.values;
    if (student && teacher) found.push(["entropy_gap", ["entropy, student minus teacher", "nats"]]);
    if (selects) found.push(["selected", ["selected tokens", ""]]);
    return found;
  };

  const valuesOf = (entry, name) => {
    if (name === "selected") {
      const chosen = new Set(entry.selected);
      return entry.ids.map((_, index) => (chosen.has(index) ? 1 : 0));
    }
    if (name === "entropy_gap") {
      const { student_entropy: student, teacher_entropy: teacher } = entry.values;
      return student.map((value, index) => (isNumber(value) && isNumber(teacher[index]) ? value - teacher[index] : null));
    }
    return entry.values[name] ?? null;
  };

  // Pieces of the text with the tokens that each has.
  const piecesOf = (entry) => {
    let [at, token] = [0, 0];
    return entry.lengths.map((length, index) => {
      const tokens = entry.counts ? entry.counts[index] : 1;
      const piece = { text: entry.text.slice(at, at + length), first: token, tokens };
      at += length;
      token += tokens;
      return piece;
    });
  };

  const largest = (values, piece) => {
    let found = null;
    for (let index = piece.first; index < piece.first + piece.tokens; index += 1) {
      const value = values[index];
      if (isNumber(value) && (found === null || Math.abs(value) > Math.abs(found))) found = value;
    }
    return found;
  };

  // The scale ends at the 98th percentile, so that one token does not make all others pale.
  const endOfScale = (values) => {
    const sizes = values.filter(isNumber).map(Math.abs).filter((size) => size > 0).sort((a, b) => a - b);
    return sizes.length ? sizes[Math.min(sizes.length - 1, Math.floor(0.98 * sizes.length))] : 0;
  };

  const level = (value, end) => (isNumber(value) && end ? Math.round(Math.min(1, Math.abs(value) / end) * LEVELS) : 0);
  const heat = (value, end, signed) => {
    const found = level(value, end);
    return found ? `${signed && value < 0 ? "cold" : "heat"}-${found}` : "";
  };

  const shown = (text) => {
    const seen = visible(text);
    return seen.replaceAll("\n", "\u23ce\n").replaceAll("\t", "\u21e5\t");
  };

  const scaleLegend = (name, label, unit, end, signed) => {
    const cell = (kind) => el("span", { class: `cell ${kind}` });
    const cells = [];
    if (name === "selected") {
      const key = [["", "no"], [`heat-${LEVELS}`, "yes"]];
      return el("span", { class: "scale" }, ...key.flatMap(([kind, text]) => [el("span", { class: "cells" }, cell(kind)), el("span", { text })]));
    }
    if (signed) for (let index = LEVELS; index > 0; index -= 1) cells.push(cell(`cold-${index}`));
    cells.push(cell(""));
    for (let index = 1; index <= LEVELS; index += 1) cells.push(cell(`heat-${index}`));
    const text = [signed ? number(-end, 3) : "0", `${number(end, 3)} ${unit}`];
    return el("span", { class: "scale", role: "img", "aria-label": `Colours of ${label}, from ${text[0]} to ${text[1]}` },
      el("span", { text: text[0] }), el("span", { class: "cells" }, ...cells), el("span", { text: text[1] }));
  };

  const share = (value) => (isNumber(value) && value < 0.0005 ? "< 0.1 %" : percent(value));

  const likely = (entry, position) => {
    const sides = ["teacher", "student"].filter((side) => entry.top?.[side]);
    if (!sides.length) return null;
    const columns = sides.map((side) => {
      const { ids, probabilities } = entry.top[side];
      const rows = ids[position].map((id, rank) => {
        const bar = el("span", { class: "bar", "aria-hidden": "true" });
        bar.style.width = `${Math.round(100 * (probabilities[position][rank] ?? 0))}%`;
        const own = id === entry.ids[position];
        return el("tr", { class: own ? "own" : "" },
          el("td", {}, el("code", { text: shown(entry.texts[id] ?? `token ${id}`) }), own ? el("span", { class: "hidden-text", text: " (sampled)" }) : null),
          el("td", { class: "number" }, bar, el("span", { text: share(probabilities[position][rank]) })));
      });
      return el("table", { class: "likely" }, el("caption", { text: `${side === "teacher" ? "Teacher" : "Student"} would say` }), el("tbody", {}, ...rows));
    });
    return el("div", { class: "sides" }, ...columns);
  };

  const information = (entry, piece, quantities) => {
    const position = piece.first;
    const ids = entry.ids.slice(position, position + piece.tokens).join(" ");
    const chosen = new Set(entry.selected);
    const rows = quantities.filter(([name]) => name !== "selected").map(([name, [label, unit]]) => {
      const value = largest(valuesOf(entry, name), piece);
      return el("div", {}, el("dt", { text: label }), el("dd", { text: `${number(value, 3)} ${unit === "share" ? "" : unit}` }));
    });
    const last = piece.first + piece.tokens - 1;
    const isSelected = Array.from({ length: piece.tokens }, (_, index) => position + index).some((index) => chosen.has(index));
    return [
      el("p", { class: "token-name" }, el("code", { text: shown(piece.text).slice(0, 200) || "(no text)" })),
      el("p", { class: "token-place", text: `token ${position + 1}${last > position ? `–${last + 1}` : ""} of ${entry.ids.length}, id ${ids}${isSelected ? ", selected" : ""}` }),
      el("dl", { class: "values" }, ...rows),
      likely(entry, position),
    ].filter(Boolean);
  };

  const limited = (pieces, all) => {
    if (all) return pieces.length;
    let characters = 0;
    for (let index = 0; index < pieces.length; index += 1) {
      characters += pieces[index].text.length;
      if (index >= MOST_TOKENS || (characters > MOST_CHARACTERS && index)) return index;
    }
    return pieces.length;
  };

  paint.plainText = (text, label) => {
    const box = el("pre", { class: "text" });
    const fill = (most) => (box.textContent = visible(text.slice(0, most)));
    fill(MOST_CHARACTERS);
    if (text.length <= MOST_CHARACTERS) return box;
    const more = el("button", { type: "button", text: `Show all ${paint.count(text.length)} characters of the ${label}`, onclick: () => {
      fill(Infinity);
      more.remove();
    } });
    return el("div", {}, box, more);
  };

  paint.responseView = (entry, { selects }) => {
    if (!entry.lengths) {
      const reason = el("p", { class: "note", text: "The tokens of this response are not known, so it has no heat map." });
      return { response: el("div", {}, reason, paint.plainText(entry.text, "response")), info: null };
    }
    const quantities = quantitiesOf(entry, selects);
    const pieces = piecesOf(entry);
    const known = quantities.some(([name]) => name === state.quantity);
    let [quantity, cursor, all] = [known ? state.quantity : quantities[0]?.[0], -1, false];
    const box = el("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Response, token by token. Arrow keys move between tokens." });
    const info = el("div", { class: "info", role: "status", tabindex: "0", "aria-label": "Token" }, el("p", { class: "note", text: "Point at a token, or move between tokens with the arrow keys." }));
    const legend = el("span", {});
    const more = el("p", {});

    const colour = () => {
      if (!quantity) return;
      const values = valuesOf(entry, quantity);
      const [label, unit] = quantities.find(([name]) => name === quantity)[1];
      const signed = SIGNED.has(quantity);
      const end = quantity === "selected" ? 1 : endOfScale(values);
      const chosen = new Set(entry.selected);
      for (const span of box.children) {
        const piece = pieces[span.dataset.at];
        let isSelected = false;
        for (let index = piece.first; index < piece.first + piece.tokens; index += 1) isSelected ||= chosen.has(index);
        span.className = ["token", heat(largest(values, piece), end, signed), isSelected ? "selected" : "", Number(span.dataset.at) === cursor ? "cursor" : ""].filter(Boolean).join(" ");
      }
      legend.replaceChildren(scaleLegend(quantity, label, unit, end, signed));
    };

    const draw = () => {
      const end = limited(pieces, all);
      const limit = all ? Infinity : MOST_CHARACTERS;
      box.replaceChildren(...pieces.slice(0, end).map((piece, at) => el("span", { class: "token", "data-at": at, text: shown(piece.text.slice(0, limit)) })));
      const hides = end < pieces.length || pieces.some((piece) => piece.text.length > limit);
      more.replaceChildren(...(hides ? [el("button", { type: "button", text: `Show all ${paint.count(pieces.length)} tokens`, onclick: () => {
        all = true;
        draw();
        box.focus();
      } })] : []));
      colour();
    };

    const move = (at, { scroll = true } = {}) => {
      box.children[cursor]?.classList.remove("cursor");
      cursor = Math.min(Math.max(at, 0), box.children.length - 1);
      const span = box.children[cursor];
      if (!span) return;
      span.classList.add("cursor");
      if (scroll) span.scrollIntoView({ block: "nearest" });
      info.classList.add("chosen");
      info.replaceChildren(...information(entry, pieces[cursor], quantities));
    };

    // The token of the line above or below that is nearest.
    const vertical = (direction) => {
      const from = box.children[Math.max(cursor, 0)].getBoundingClientRect();
      let [best, row] = [cursor, null];
      for (let at = cursor + direction; at >= 0 && at < box.children.length; at += direction) {
        const place = box.children[at].getBoundingClientRect();
        const away = Math.abs(place.bottom - from.bottom) > from.height / 2;
        if (!away) continue;
        if (row !== null && Math.abs(place.bottom - row) > from.height / 2) break;
        row ??= place.bottom;
        const distance = (one) => Math.abs(one.left - from.left);
        if (best === cursor || distance(place) < distance(box.children[best].getBoundingClientRect())) best = at;
      }
      return best;
    };
    const nextSelected = () => {
      for (let at = cursor + 1; at < box.children.length; at += 1) if (box.children[at].classList.contains("selected")) return at;
      return cursor;
    };

    box.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const moves = { ArrowRight: () => cursor + 1, ArrowLeft: () => cursor - 1, ArrowDown: () => vertical(1), ArrowUp: () => vertical(-1), Home: () => 0, End: () => Infinity, m: nextSelected };
      if (!(event.key in moves)) return;
      event.preventDefault();
      event.stopPropagation();
      move(moves[event.key]());
    });
    box.addEventListener("focus", () => cursor < 0 && move(0, { scroll: false }));
    const point = (event) => {
      const at = event.target.closest("[data-at]")?.dataset.at;
      if (at !== undefined && Number(at) !== cursor) move(Number(at), { scroll: false });
    };
    box.addEventListener("mouseover", point);
    box.addEventListener("click", point);

    const choose = paint.select(quantities.map(([name, [label]]) => [name, label]), quantity, (value) => {
      quantity = state.quantity = value;
      paint.store("quantity", value);
      colour();
    });
    paint.nextQuantity = () => {
      const names = quantities.map(([name]) => name);
      if (!names.length) return;
      choose.value = names[(names.indexOf(quantity) + 1) % names.length];
      choose.dispatchEvent(new Event("change"));
    };
    draw();
    const note = el("span", { class: "mark-note" }, el("span", { class: "token selected", text: "underlined" }), " selected");
    const controls = quantities.length ? el("div", { class: "controls" }, paint.field("Colour", choose, "quantity"), legend, selects ? note : null) : "";
    return { response: el("div", {}, controls, box, more), info };
  };
})();
