"use strict";
/* The page of several runs: the same parts side by side, and differences to the first run. */

async function main() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser has no DecompressionStream; a newer one does");
  const told = await inflateJson("content");
  place("facts").append(pairs(told.folders, "pairs"));
  for (const note of told.notes) place("notes").append(make("p", { class: "warning", dir: "auto", text: note }));
  figures(told);
  settings(told);
  agreements(told);
  if (told.examples) await maps(told.examples);
  else place("map-help").textContent = "No data maps side by side: no other run has scores of examples of the first.";
  for (const group of told.curves) curves(group);
  mixing(told);
  lengths(told);
  samples(told);
  place("precision").textContent = "Curves are rounded to 6 significant digits, the numbers of single examples to 5.";
}

function inside(id) {
  return place(id).querySelector(".content");
}

function signed(value, digits, unit = "") {
  if (value === null) return "–";
  const found = number(value);
  if (!Number.isFinite(found)) return show(found);
  return (found < 0 ? "−" : "+") + Math.abs(found).toFixed(digits) + unit;
}

function fixed(value, digits, unit = "") {
  const found = number(value);
  return Number.isFinite(found) ? found.toFixed(digits) + unit : show(found);
}

function figures(told) {
  if (!told.figures.length) return inside("results").append(make("p", { class: "note", text: "No run has held-out figures." }));
  const whole = (value) => (value === null ? "–" : count(Math.round(value)));
  const rows = told.figures.map((row) => [row.model, row.run + (row.same_heldout ? "" : " *"), fixed(row.nll, 4), signed(row.d_nll, 4), fixed(row.perplexity, 3), signed(row.d_perplexity, 3),
    fixed(100 * number(row.token_accuracy), 2, " %"), signed(row.d_token_accuracy === null ? null : 100 * row.d_token_accuracy, 2, " %"), whole(row.steps), whole(row.tokens), whole(row.seconds)]);
  inside("results").append(plainTable("Held-out figures by model and run", ["model", "run", "NLL", "±", "perplexity", "±", "accuracy", "±", "steps", "tokens", "seconds"], rows, { left: 2 }));
  if (told.figures.some((row) => !row.same_heldout)) inside("results").append(make("p", { class: "note", text: "* about other held-out examples than the first run's, or the first has no such model." }));
}

function settings(told) {
  if (!told.settings.length) return inside("settings").append(make("p", { class: "note", text: "All settings are the same." }));
  inside("settings").append(plainTable("Settings that are not the same in all runs", ["knob", ...told.labels], told.settings, { left: 99 }));
}

function agreements(told) {
  const share = (value) => (value === null ? "–" : fixed(100 * number(value), 1, " %"));
  if (!told.agreements.length) return inside("scores").append(make("p", { class: "note", text: "No scores to compare." }));
  const rows = told.agreements.map((one) => [one.label, count(one.examples), count(one.common), fixed(one.spearman, 3), share(one.same_half), share(one.shared_confident)]);
  inside("scores").append(plainTable(`Compared with ${told.labels[0]}`, ["run", "examples", "in common", "rank correlation", "same half", "confident in both"], rows),
    make("p", { class: "note", text: "Rank correlation: Spearman's, of confidence; confident in both: of those that are confident in either." }));
}

async function maps(about) {
  const n = about.shown, runs = about.labels.length, numbers = new Columns(await inflate("numbers"));
  const decimals = () => numbers.decimals(n, about.digits);
  const set = { n, perplexity: about.labels.map(decimals), spread: about.spread.map((has) => (has ? decimals() : null)), half: [], rank: [] };
  for (let k = 0; k < runs; k++) {
    set.half.push(numbers.counts(n));
    set.rank.push(numbers.counts(n));
  }
  set.id = new Columns(await inflate("ids")).texts(n);
  set.chosen = new Chosen(n);
  place("map-lead").textContent = `${n < about.total ? `${count(n)} of ` : ""}${plural(about.total, "example")} that ${about.labels.join(", ")} have in common.${about.without.length ? ` Not among them, for they share none or have no scores: ${about.without.join(", ")}.` : ""} The axes are the same in all pictures of a kind; ranks count all examples of a run.`;
  const told = (i) => about.labels.map((label, k) => [label, `confidence ${show(-set.perplexity[k][i])}, rank ${count(set.rank[k][i] + 1)} of ${count(about.of[k])}, ${HALVES[set.half[k][i]]}`]);
  const card = (i) => make("div", {}, make("div", { class: "id", dir: "auto", text: set.id(i) }), pairs(told(i), ""));
  const words = (i) => `${set.id(i)}: ${told(i).map(([label, text]) => `${label} ${text}`).join("; ")}`;
  const common = { chosen: set.chosen, card, words, help: "map-help", height: 340 };
  const confidence = (k, title) => ({ values: set.perplexity[k], axis: { ...about.confidence, counts: undefined }, title, label: negative });
  const rising = (axis) => ({ ...axis, axis: { ...axis.axis, falling: true } }); // high confidence to the right
  const picture = (title, options) => {
    const figure = make("figure", {}, make("figcaption", {}, make("strong", { text: title })));
    place("maps").append(figure);
    const made = new Scatter(figure, { ...common, label: title, ...options });
    made.recolour({ of: Uint8Array.from(set.half[0]), bins: () => [category(0), category(1), category(6)] });
  };
  for (let k = 0; k < runs; k++) {
    if (!set.spread[k]) continue;
    picture(`${about.labels[k]}: data map`, { x: { values: set.spread[k], axis: { ...about.variability, counts: undefined }, title: "variability (log)", label: brief },
      y: confidence(k, "confidence (log)"), lines: [{ y: about.medians[k], text: `${about.borders[k]} −${brief(about.medians[k])}` }] });
  }
  for (let k = 1; k < runs; k++) {
    picture(`Confidence in ${about.labels[k]} against ${about.labels[0]}`, { x: rising(confidence(0, `confidence in ${about.labels[0]} (log)`)), y: confidence(k, "confidence (log)"),
      lines: [{ y: about.medians[k], text: `${about.borders[k]} −${brief(about.medians[k])}` }] });
  }
  place("maps").after(make("ul", { class: "legend" }, ...["confident", "unconfident"].map((name, k) => make("li", {}, make("span", { class: `box back-${k}` }), ` ${name} in ${about.labels[0]}`))));
  commonTable(about, set);
}

function commonTable(about, set) {
  const numeric = (title, value, cell = (i) => show(value(i))) => ({ title, kind: "number", value, cell });
  const columns = [{ title: "id", kind: "text", value: set.id, cell: (i) => make("span", { class: "id", dir: "auto", text: set.id(i) }) }];
  about.labels.forEach((label, k) => {
    columns.push(numeric(`confidence in ${label}`, (i) => -set.perplexity[k][i]));
    if (k > 0) columns.push(numeric(`rank in ${label} − first`, (i) => set.rank[k][i] - set.rank[0][i]));
    columns.push({ title: `half in ${label}`, kind: "text", value: (i) => HALVES[set.half[k][i]], cell: (i) => HALVES[set.half[k][i]] });
  });
  const table = new SortedTable(place("map-table"), { caption: "Examples", columns, size: 25, empty: "no example" });
  const update = () => chosenRows(set, table);
  set.chosen.onChange(update);
  update();
}

function curves(group) {
  if (!group.panels.length) return;
  const grid = make("div", { class: "grid" });
  const fold = make("details", { open: group.name === "SFTMix" }, make("summary", { text: group.name }), grid);
  inside("curves").append(fold);
  const draw = () => group.panels.forEach((panel) => curvePicture(grid, panel));
  if (fold.open) draw();
  else fold.addEventListener("toggle", draw, { once: true });
}

function mixing(told) {
  for (const { label, lambdas } of told.lambdas) {
    if (lambdas && lambdas.total) {
      histogram(inside("mixing"), { title: label, parts: [{ counts: lambdas.counts, k: 0 }], ends: { from: 0, to: 1 }, axisTitle: "λ",
        words: `${count(lambdas.total)} ${lambdas.unit}, mean ${brief(number(lambdas.mean), 4)}, α ${lambdas.alpha}, seed ${lambdas.seed}` });
    } else inside("mixing").append(make("p", { class: "note", text: `${label}: no λ.` }));
  }
}

function lengths(told) {
  for (const { label, by_supervised: found } of told.lengths) {
    histogram(inside("lengths"), { title: label, parts: [{ counts: found.counts, k: 2 }], ends: found, axisTitle: "tokens", label: (value) => count(Math.round(value)),
      words: `least ${count(found.least)}, median ${count(found.median)}, most ${count(found.most)}` });
  }
}

function samples(told) {
  if (!told.samples.length) return inside("samples").append(make("p", { class: "note", text: "No sample answers." }));
  for (const sample of told.samples) {
    const rows = [["expected", sample.expected], ...sample.answers.map(([run, model, text]) => [`${run}: ${model}`, text])];
    const list = rows.flatMap(([name, text]) => [make("dt", { text: name }), make("dd", {}, quoted(text))]);
    inside("samples").append(make("article", { class: "sample" }, quoted(sample.prompt, "quoted changed"), make("dl", {}, ...list)));
  }
}

main().catch((error) => {
  place("failed").hidden = false;
  place("failed").textContent = `This page could not be drawn: ${error.message}`;
  console.error(error);
});
