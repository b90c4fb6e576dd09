"use strict";
/* Elements from data. Texts are put in as text: nothing of the data is ever read as markup. */

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function drawn(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function place(id) {
  return document.getElementById(id);
}

/* A text of somebody's data: its own direction, and any line breaks it has. */
function quoted(text, className = "quoted") {
  return make("span", { class: className, dir: "auto", text });
}

function pairs(list, className) {
  const rows = list.flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { dir: "auto", text: value })]);
  return make("dl", { class: className }, ...rows);
}

/* A small table that is not sorted; numbers stand to the right. */
function plainTable(caption, columns, rows, { left = 1 } = {}) {
  const head = columns.map((name, i) => make("th", { scope: "col", class: i < left ? "" : "number", text: name }));
  const body = rows.map((row) =>
    make("tr", {}, ...row.map((cell, i) =>
      make(i === 0 ? "th" : "td", { scope: i === 0 ? "row" : undefined, class: i < left ? "" : "number", text: cell }))));
  const table = make("table", {}, make("caption", { text: caption }), make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...body));
  return scrolling(table, caption);
}

/* What may be wider than the page scrolls by itself, with the keyboard too. */
function scrolling(content, label) {
  return make("div", { class: "scrolling", tabindex: "0", role: "region", "aria-label": label }, content);
}

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

const isDark = window.matchMedia("(prefers-color-scheme: dark)");

function onTheme(call) {
  isDark.addEventListener("change", call);
}

/* Anchors of viridis; the end that the page's ground would swallow is left out. */
const VIRIDIS = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"].map(
  (hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));

function viridis(share) {
  const [low, high] = isDark.matches ? [0.16, 1] : [0, 0.93];
  const at = (low + (high - low) * share) * (VIRIDIS.length - 1);
  const i = Math.min(VIRIDIS.length - 2, Math.floor(at));
  const mixed = VIRIDIS[i].map((part, k) => Math.round(part + (at - i) * (VIRIDIS[i + 1][k] - part)));
  return `rgb(${mixed.join(",")})`;
}

/* The colours of Okabe and Ito, which colour-blind readers tell apart; curves have dashes of their own beside. */
function category(i) {
  return style("series-" + (i % 7));
}

const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [12, 5], [4, 2, 1, 2], [1, 2]];

/* Round values for the labels of an axis. */
function ticks(from, to, log, most = 6) {
  if (!log) {
    const raw = (to - from) / most, size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((f) => f * size).find((s) => s >= raw * 0.999);
    const found = [];
    for (let k = Math.ceil(from / step - 1e-9); k * step <= to * (1 + 1e-12); k++) found.push(Number((k * step).toPrecision(12)));
    return found;
  }
  const decades = Math.log10(to / from);
  if (decades < 0.5) return ticks(from, to, false, most).filter((value) => value > 0);
  const parts = decades < 1.2 ? [1, 1.5, 2, 3, 5, 7] : decades < 2.2 ? [1, 2, 5] : decades < 3.5 ? [1, 3] : [1];
  const found = [];
  const every = Math.max(1, Math.ceil(decades / most));
  for (let p = Math.floor(Math.log10(from)); p <= Math.log10(to); p++) {
    if (p % every) continue;
    for (const part of parts) {
      const value = Number(part + "e" + p);
      if (value >= from && value <= to) found.push(value);
    }
  }
  return found;
}
