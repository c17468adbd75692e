// Elements, numbers, texts and settings of the page. Text of a run becomes text nodes, never markup.
"use strict";
window.paint = {};
(() => {
  const el = (tag, properties = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "class") element.className = value;
      else if (name === "text") element.textContent = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  };

  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

  // Four significant digits; very small and very large numbers with an exponent.
  const number = (value, digits = 4) => {
    if (!isNumber(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) {
      return value.toExponential(Math.max(1, digits - 2)).replace(/\.?0+e/, "e").replace("e+", "e");
    }
    if (size >= 1000) return Math.round(value).toLocaleString("en-US");
    return String(Number(value.toPrecision(digits)));
  };
  const fixed = (value, digits = 2) => (isNumber(value) ? value.toFixed(digits) : "–");
  const percent = (value, digits = 1) => (isNumber(value) ? `${(100 * value).toFixed(digits)} %` : "–");
  const count = (value) => (isNumber(value) ? value.toLocaleString("en-US") : "–");
  const counted = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

  // Characters without a shape, and those that change the direction of what follows, become visible ones.
  const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
  const shape = (character) => {
    const code = character.charCodeAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    if (code === 0x7f) return "\u2421";
    return `\u27e8${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  };
  const visible = (text) => String(text).replace(CONTROL, shape);

  // The browser may refuse its storage to a file.
  const stored = (name, fallback) => {
    try {
      return JSON.parse(localStorage.getItem(`paint.${name}`)) ?? fallback;
    } catch {
      return fallback;
    }
  };
  const store = (name, value) => {
    try {
      localStorage.setItem(`paint.${name}`, JSON.stringify(value));
    } catch {
      // Then the choice holds until the page is closed.
    }
  };

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const say = (text) => {
    document.getElementById("status").textContent = text;
  };

  const field = (label, control, id) => {
    control.id = id;
    return el("div", { class: "field" }, el("label", { for: id, text: label }), control);
  };
  const select = (options, value, onchange) => {
    const control = el("select", { onchange: () => onchange(control.value) });
    for (const [key, label] of options) control.append(el("option", { value: key, text: label }));
    control.value = value;
    return control;
  };

  // stack: on a phone each row becomes a block of lines. The roles keep it a table for screen readers there.
  const table = (caption, heads, rows, { numeric = [], stack = true } = {}) => {
    const cell = (tag, value, index) => {
      const properties = { class: numeric.includes(index) ? "number" : "", role: tag === "th" ? "columnheader" : "cell" };
      if (tag === "th") properties.scope = "col";
      else if (stack) properties["data-head"] = heads[index];
      const made = el(tag, properties);
      made.append(value instanceof Node ? value : visible(value));
      return made;
    };
    return el(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
      el(
        "table",
        { class: stack ? "stack" : "", role: "table" },
        el("caption", { class: "hidden-text", text: caption }),
        el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...heads.map((head, index) => cell("th", head, index)))),
        el("tbody", { role: "rowgroup" }, ...rows.map((row) => el("tr", { role: "row" }, ...row.map((value, index) => cell("td", value, index))))),
      ),
    );
  };

  Object.assign(paint, {
    el, isNumber, number, fixed, percent, count, counted, visible, stored, store, color, say, field, select, table,
  });
})();
