"use strict";
/* Curves over the steps by uPlot, and histograms as SVG, each with its numbers in words beside it. */

const charts = [];
onTheme(() => charts.forEach((redraw) => redraw()));

/* One picture of several runs; the steps of all are one axis, with nothing where a run has none. */
function curvePicture(mount, panel, { height = 190 } = {}) {
  const figure = make("figure", { class: "curves" });
  const plot = make("div", { class: "plot", tabindex: "0", role: "application",
    "aria-label": `${panel.title} over optimizer steps; left and right arrows read the values` });
  const readout = make("p", { class: "readout", role: "status" });
  const unit = panel.unit ? `, ${panel.unit}` : "";
  figure.append(make("figcaption", {}, make("strong", { text: panel.title }), unit), plot, readout, curveLegend(panel), curveNotes(panel));
  mount.append(figure);
  const steps = [...new Set(panel.curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  const where = new Map(steps.map((step, k) => [step, k]));
  const column = (curve, key) => {
    const found = new Array(steps.length).fill(undefined); // undefined is joined over, null is a gap
    curve.steps.forEach((step, k) => (found[where.get(step)] = curve[key][k]));
    return found;
  };
  const data = [steps], series = [{}];
  const lines = panel.curves.map((curve) => ({ curve, k: curve.k, smooth: Boolean(curve.smooth) }));
  for (const { curve, k, smooth } of lines) {
    data.push(column(curve, "values"));
    series.push({ label: curve.label, k, faint: smooth, of: curve });
    if (smooth) {
      data.push(column(curve, "smooth"));
      series.push({ label: curve.label + ", smoothed", k });
    }
  }
  let picture = null;
  const redraw = () => {
    if (picture) picture.destroy();
    picture = new uPlot(curveOptions(plot, series, height, (i) => read(i)), data, plot);
  };
  const read = (i) => {
    const told = series.slice(1).filter((one) => one.of && data[series.indexOf(one)][i] !== undefined)
      .map((one) => `${one.label} ${finiteOr(data[series.indexOf(one)][i])}`);
    readout.textContent = i === null ? "" : `step ${count(steps[i])}: ${told.join(" · ") || "no value"}`;
  };
  let cursor = -1;
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    cursor = Math.max(0, Math.min(steps.length - 1, cursor + step * (event.shiftKey ? 10 : 1)));
    picture.setCursor({ left: picture.valToPos(steps[cursor], "x"), top: 10 }, false);
    read(cursor);
    event.preventDefault();
  });
  redraw();
  charts.push(redraw);
  new ResizeObserver(() => plot.clientWidth && picture.setSize({ width: plot.clientWidth, height })).observe(plot);
}

function finiteOr(value) {
  return value === null ? "not finite" : show(value);
}

function curveOptions(plot, series, height, read) {
  const axis = { stroke: style("soft"), grid: { stroke: style("grid"), width: 1 }, ticks: { stroke: style("grid"), width: 1 },
    font: "12px " + style("plain") };
  return {
    width: Math.max(200, plot.clientWidth), height, legend: { show: false }, scales: { x: { time: false }, y: { range: roomy } },
    cursor: { drag: { x: false, y: false }, points: { show: true } },
    axes: [{ ...axis, size: 30, values: (_, all) => all.map((v) => (Number.isInteger(v) ? count(v) : "")) },
      { ...axis, size: 66, values: (_, all) => all.map((v) => (v === null ? "" : brief(v, 4))) }],
    series: series.map((one, i) => i === 0 ? {} : {
      label: one.label, stroke: category(one.k), width: one.faint ? 1 : 2, alpha: one.faint ? 0.35 : 1, dash: DASHES[one.k % DASHES.length],
      spanGaps: false, points: { show: true, filter: alone, size: 6, fill: category(one.k) },
    }),
    hooks: { setCursor: [(u) => read(u.cursor.idx ?? null)] },
  };
}

/* A constant is drawn in the middle, not as noise from edge to edge. */
function roomy(_, low, high) {
  if (low === null) return [0, 1];
  const room = high > low * (1 + 1e-9) || high > low && low <= 0 ? (high - low) * 0.08 : Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

/* Points where there is no line to see: few values, or one between two gaps. */
function alone(u, series) {
  const at = [...u.data[series].keys()].filter((k) => u.data[series][k] !== undefined);
  const value = (k) => (k in at ? u.data[series][at[k]] : null);
  return at.filter((_, k) => value(k) !== null && (at.length < 3 || (value(k - 1) === null && value(k + 1) === null)));
}

function swatch(k) {
  const line = drawn("line", { x1: 0, x2: 30, y1: 6, y2: 6, "stroke-width": 3, class: `stroke-${k % 7}`, "stroke-dasharray": DASHES[k % DASHES.length].join(" ") });
  return drawn("svg", { width: 30, height: 12, "aria-hidden": "true" }, line);
}

function curveLegend(panel) {
  return make("ul", { class: "legend" }, ...panel.curves.map((curve) =>
    make("li", {}, swatch(curve.k), ` ${curve.label} `, make("span", { class: "soft", text: `last ${show(curve.last)}` }))));
}

function curveNotes(panel) {
  const told = [];
  if (panel.curves.some((curve) => curve.smooth)) told.push("Faint: each step; strong: exponential mean.");
  for (const curve of panel.curves) {
    if (curve.of > curve.steps.length) told.push(`${curve.label}: of ${count(curve.of)} steps the lowest and highest of each stretch are drawn.`);
    if (curve.bad) told.push(`${curve.label}: ${plural(curve.bad, "step")} without a finite value, left open.`);
    if (curve.skipped && curve.skipped.length) told.push(`${curve.label}: left out of training at step ${curve.skipped.join(", ")}.`);
  }
  return make("p", { class: "note", text: told.join(" ") });
}

/* parts: [{label, counts, k}]; ends: {from, to, log}; marks: [{at, text}]. */
function histogram(mount, { title, parts, ends, axisTitle, label = brief, between = (a, b) => `${label(a)} to ${label(b)}`, marks = [], words = "" }) {
  const width = 460, height = 190, left = 46, bottom = 40, top = 16, right = 12;
  const wide = width - left - right, high = height - top - bottom, size = parts[0].counts.length;
  const sums = parts[0].counts.map((_, i) => parts.reduce((sum, part) => sum + part.counts[i], 0));
  const most = Math.max(1, ...sums), total = sums.reduce((a, b) => a + b, 0);
  const axis = { ...ends, log: Boolean(ends.log) };
  const edge = (i) => axis.log ? axis.from * (axis.to / axis.from) ** (i / size) : axis.from + (axis.to - axis.from) * i / size;
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${words || plural(total, "value")}`, class: "histogram" });
  for (const value of ticks(0, most, false, 4)) {
    const y = top + high * (1 - value / most);
    svg.append(drawn("line", { x1: left, x2: left + wide, y1: y, y2: y, class: "grid" }), svgText(brief(value, 4), left - 6, y + 4, "end"));
  }
  for (let i = 0; i < size; i++) {
    let from = top + high;
    for (const part of parts) {
      const tall = high * part.counts[i] / most;
      if (!tall) continue;
      from -= tall;
      const bar = drawn("rect", { x: left + wide * i / size + 0.5, width: wide / size - 1, y: from, height: tall, class: `fill-${part.k}` });
      const of = part.label ? `${part.label}, ` : "";
      bar.append(drawn("title", {}, `${of}${between(edge(i), edge(i + 1))}: ${count(part.counts[i])}`));
      svg.append(bar);
    }
  }
  for (const value of ticks(axis.from, axis.to, axis.log, 6)) svg.append(svgText(label(value), left + wide * along(axis, value), top + high + 16, "middle"));
  svg.append(svgText(axisTitle, left + wide / 2, height - 6, "middle", "ink"));
  for (const { at, text } of marks) {
    const x = left + wide * along(axis, at);
    svg.append(drawn("line", { x1: x, x2: x, y1: top - 4, y2: top + high, class: "mark" }));
    const late = x > left + wide / 2;
    svg.append(svgText(text, late ? x - 5 : x + 5, top + 6, late ? "end" : "start", "ink"));
  }
  const legend = parts.length > 1 ? make("ul", { class: "legend" }, ...parts.map((part) => make("li", {}, make("span", { class: `box back-${part.k}` }), ` ${part.label}`))) : null;
  const figure = make("figure", {}, make("figcaption", {}, make("strong", { text: title })), svg, legend, make("p", { class: "note", text: words }));
  mount.append(figure);
}

function svgText(text, x, y, anchor, kind = "soft") {
  const element = drawn("text", { x, y, "text-anchor": anchor, class: kind });
  element.textContent = text;
  return element;
}
