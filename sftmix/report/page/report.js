"use strict";
/* The page of one run: every part from the data inside it, and a sentence where there are none. */

async function main() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser has no DecompressionStream; a newer one does");
  const told = await inflateJson("content");
  facts(told);
  results(told);
  const set = told.examples ? await examples(told.examples) : null;
  if (set) dataMap(told.map, set);
  else absent("map", "No scores yet: `sftmix score` writes dynamics.parquet.");
  extremes(told);
  lengths(told, set);
  curves(told);
  mixing(told);
  samples(told);
  settings(told);
  precision(told);
}

function absent(id, text) {
  const section = place(id);
  section.replaceChildren(section.querySelector("h2"), make("p", { class: "note", text }));
}

function inside(id) {
  return place(id).querySelector(".content");
}

function facts(told) {
  const list = make("dl", { class: "facts" }, ...told.facts.map(([name, value]) =>
    make("div", {}, make("dt", { text: name }), make("dd", { dir: "auto", text: value }))));
  place("facts").append(list);
  for (const note of told.notes) place("notes").append(make("p", { class: "warning", dir: "auto", text: note }));
}

function results(told) {
  if (!told.results) return absent("results", "No held-out figures: `sftmix evaluate` writes evaluation.json, where there are held-out examples.");
  inside("results").append(plainTable(told.results.title, told.results.columns, told.results.rows));
}

function extremes(told) {
  if (!told.extremes || !told.extremes.most.length) return absent("extremes", "No scores yet.");
  for (const [name, list] of [["Most confident", told.extremes.most], ["Least confident", told.extremes.least]]) {
    const items = list.map((one) => {
      const spread = one.variability === null ? "" : `, variability ${show(number(one.variability))}`;
      const numbers = `rank ${count(one.rank)}: confidence ${show(number(one.confidence))}${spread}, top-1 ${show(number(one.share))}, last loss ${show(number(one.loss))}, ${plural(one.tokens, "token")}`;
      return make("li", {}, make("span", { class: "id", dir: "auto", text: one.id }), make("div", { class: "soft", text: numbers }), ...quotes(one.prompt, one.answer));
    });
    inside("extremes").append(make("div", {}, make("h3", { text: name }), make("ol", { class: "extremes" }, ...items)));
  }
}

function lengths(told, set) {
  const found = told.lengths, mount = inside("lengths");
  const of = (one) => `least ${count(one.least)}, median ${count(one.median)}, most ${count(one.most)}`;
  if (found) {
    const whole = (value) => count(Math.round(value));
    histogram(mount, { title: "Tokens of an example", parts: [{ counts: found.by_tokens.counts, k: 0 }], ends: found.by_tokens, axisTitle: "tokens", label: whole, words: of(found.by_tokens) });
    histogram(mount, { title: "Tokens that bear loss", parts: [{ counts: found.by_supervised.counts, k: 2 }], ends: found.by_supervised, axisTitle: "tokens", label: whole, words: of(found.by_supervised) });
    const share = found.supervised / found.tokens;
    histogram(mount, { title: "Supervised share of an example", parts: [{ counts: found.share, k: 3 }], ends: { from: 0, to: 1 }, axisTitle: "tokens that bear loss / tokens",
      marks: [{ at: share, text: `all tokens ${brief(share)}` }], words: `${count(found.supervised)} of ${count(found.tokens)} tokens of ${plural(found.examples, "training example")}` });
  } else mount.append(make("p", { class: "note", text: "The examples' tokens could not be read, so only the tokens that bear loss are known." }));
  if (!set) return place("length-note").append("No scores yet.");
  const map = told.map;
  const picture = new Scatter(place("length-picture"), { x: lengthAxis(map, set), y: confidenceAxis(map, set), height: 340, chosen: set.chosen, lasso: true,
    label: "Confidence against tokens that bear loss", help: "map-help", lines: [{ y: map.median, text: `${map.border || "median"} −${brief(map.median)}` }],
    card: (i) => card(set, i), words: (i) => words(set, i) });
  picture.recolour(pictures[0].colour);
  pictures.push(picture);
  place("length-note").textContent = `Rank correlation of confidence and length: ${brief(number(map.length_correlation))}. The chosen examples are those of the data map.`;
}

function curves(told) {
  if (!told.curves.length) return absent("curves", "No optimizer step yet.");
  for (const panel of told.curves) curvePicture(inside("curves"), panel);
}

function mixing(told) {
  const found = told.lambdas, mount = inside("mixing");
  if (found && found.total) {
    const words = `${count(found.total)} ${found.unit} of ${plural(found.steps, "step")}, mean ${brief(number(found.mean), 4)}, ${brief(100 * number(found.outer))} % below 0.1 or above 0.9. Drawn again from seed ${found.seed}, α ${found.alpha}, one λ for each ${found.lam}: what training used.`;
    histogram(mount, { title: "λ ~ Beta(α, α)", parts: [{ counts: found.counts, k: 0 }], ends: { from: 0, to: 1 }, axisTitle: "λ", words });
  } else if (!found) mount.append(make("p", { class: "note", text: "No λ: SFTMix was not trained in this folder, or its λ cannot be drawn again (see above)." }));
  else mount.append(make("p", { class: "note", text: "No pair was mixed." }));
  if (!told.map) return;
  const axis = told.map.confidence;
  const parts = ["confident half", "unconfident half", "not split"].map((label, k) => ({ label, k, counts: axis.halves[k] })).filter((part) => part.counts.some(Boolean));
  histogram(mount, { title: "Confidence of the halves that are paired", parts, ends: { from: axis.from, to: axis.to, log: true }, axisTitle: "confidence (log)", label: negative,
    marks: [{ at: told.map.median, text: `${told.map.border || "median"} −${brief(told.map.median)}` }], words: plural(parts.reduce((sum, part) => sum + part.counts.reduce((a, b) => a + b, 0), 0), "example") });
}

function samples(told) {
  if (!told.samples.length) return absent("samples", "No sample answers: `sftmix evaluate` writes them (evaluate.num_samples).");
  for (const sample of told.samples) {
    const rows = [["expected", sample.expected, true], ...sample.answers];
    const list = rows.flatMap(([name, text, ended]) => [make("dt", { text: name }),
      make("dd", {}, quoted(text), ended ? null : make("span", { class: "soft", text: "no end within evaluate.max_new_tokens" }))]);
    inside("samples").append(make("article", { class: "sample" }, quoted(sample.prompt, "quoted changed"), make("dl", {}, ...list)));
  }
}

function settings(told) {
  const mount = inside("settings");
  const fold = (title, content, open) => mount.append(make("details", { open }, make("summary", { text: title }), content));
  const others = told.settings.filter(([, , same]) => !same);
  fold(`${plural(others.length, "setting")} of this run that are not defaults`, pairs(others, "pairs"), true);
  fold(`All ${plural(told.settings.length, "setting")}`, pairs(told.settings, "pairs"));
  fold("Stages", pairs(told.stages, "pairs"));
  fold("Versions", pairs(told.versions, "pairs"), true);
  fold("Hashes of data, models and halves", pairs(told.hashes.length ? told.hashes : [["none", "no stage has recorded any"]], "pairs"), true);
  fold("What became of the rows (data.json)", pairs(told.account.length ? told.account : [["none", "data.json is not there"]], "pairs"));
}

function precision(told) {
  const parts = ["Curves and extremes are rounded to 6 significant digits."];
  const about = told.examples;
  if (about) {
    parts.unshift(`The numbers of single examples are rounded to ${about.digits} significant digits; ids are whole.`);
    parts.push(about.has_texts ? `Texts of the data map are cut to at most ${plural(about.cut, "character")} ${about.answers ? "each for prompt and answer" : "of the prompt (of the answer where there is no prompt)"}; … marks a cut. Those of the extremes are cut to 1,500.` : "No texts are in this page.");
  }
  place("precision").textContent = parts.join(" ");
  place("remarks").textContent = told.remarks.join(" ");
}

main().catch((error) => {
  place("failed").hidden = false;
  place("failed").textContent = `This page could not be drawn: ${error.message}`;
  console.error(error);
});
