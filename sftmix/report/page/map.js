"use strict";
/* The data map of one run, its colours, the table of examples beside it, and choosing without a mouse. */

/* The columns of the examples, by falling confidence. */
async function examples(about) {
  const n = about.shown, numbers = new Columns(await inflate("numbers"));
  const decimals = () => numbers.decimals(n, about.digits);
  const set = { ...about, n, perplexity: decimals(), share: decimals(), loss: decimals() };
  set.variability = about.has_variability ? decimals() : null;
  for (const name of ["supervised", "tokens", "half", "source", "rank"]) set[name] = numbers.counts(n);
  set.id = new Columns(await inflate("ids")).texts(n);
  const texts = new Columns(await inflate("texts")).texts(2 * n);
  set.prompt = (i) => texts(2 * i);
  set.answer = (i) => texts(2 * i + 1);
  set.confidence = set.perplexity.map((value) => -value);
  set.chosen = new Chosen(n);
  return set;
}

const HALVES = ["confident", "unconfident", "not split"];

function card(set, i) {
  const list = [["confidence", show(set.confidence[i])]];
  if (set.variability) list.push(["variability", show(set.variability[i])]);
  list.push(["top-1 share", show(set.share[i])], ["last loss", show(set.loss[i]) + " nats per token"],
    ["tokens that bear loss", count(set.supervised[i])], ["half", HALVES[set.half[i]]]);
  if (set.has_tokens) list.push(["tokens", count(set.tokens[i])]);
  if (set.sources.length > 1) list.push(["source", set.sources[set.source[i]]]);
  return make("div", {}, make("div", { class: "id", dir: "auto", text: set.id(i) }), pairs(list, ""), ...quotes(set.prompt(i), set.answer(i)));
}

function quotes(prompt, answer) {
  return [prompt ? quoted(prompt) : null, answer ? quoted(answer, "quoted answer") : null].filter(Boolean);
}

function words(set, i) {
  const spread = set.variability ? `, variability ${show(set.variability[i])}` : "";
  return `${set.id(i)}, rank ${count(set.rank[i] + 1)}, ${HALVES[set.half[i]]}, confidence ${show(set.confidence[i])}${spread}, ${set.prompt(i) || set.answer(i)}`;
}

function negative(value) {
  return "−" + brief(value);
}

function dataMap(map, set) {
  const byVariability = Boolean(map.variability);
  place("map-lead").textContent = mapLead(map, set);
  const lines = [{ y: map.median, text: `${map.border || "median"} −${brief(map.median)}${map.split ? "" : ", not split yet"}` }];
  const names = [
    { text: map.split ? "confident half: easy to learn" : "easy to learn", x: 0.015, y: 0.045, align: "left" },
    { text: map.split ? "unconfident half: hard to learn" : "hard to learn", x: 0.015, y: 0.975, align: "left" },
  ];
  if (byVariability) names.push({ text: "ambiguous", x: 0.985, y: 0.975, align: "right" });
  const y = confidenceAxis(map, set);
  const x = byVariability
    ? { values: set.variability, axis: map.variability, title: "variability (standard deviation of perplexity, log)", label: brief }
    : lengthAxis(map, set);
  const picture = new Scatter(place("map-picture"), { x, y, lines, names, chosen: set.chosen, help: "map-help",
    label: "Data map: one point an example", card: (i) => card(set, i), words: (i) => words(set, i) });
  place("map-note").textContent = edgeNote(map.confidence, "confidence") + (byVariability ? edgeNote(map.variability, "variability") : "");
  pictures.push(picture);
  colours(set);
  const table = examplesTable(set, picture);
  rangeForm(set, byVariability);
  const update = () => chosenRows(set, table);
  set.chosen.onChange(update);
  update();
}

function mapLead(map, set) {
  const drawn = set.shown < set.total ? `${count(set.shown)} of ${count(set.total)} examples, chosen evenly by rank of confidence, both ends included` : plural(set.total, "example");
  const points = map.points === 1 ? "one scoring point" : `${map.points} scoring points`;
  const axes = map.variability ? "Across: how much its perplexity changes between them."
    : "One point gives no variability, so the tokens that bear loss are drawn across in its place.";
  const halves = map.split && !map.border ? " The halves are not cut by confidence." : map.split ? ` The ${map.border} parts ${count(map.confident)} confident from ${count(map.unconfident)} unconfident examples.` : " They are not split yet.";
  return `${drawn}, ${points} (${map.source}). Upwards: confidence, minus the mean perplexity of the answer. ${axes}${halves}`;
}

function confidenceAxis(map, set) {
  return { values: set.perplexity, axis: map.confidence, title: "confidence (log)", label: negative };
}

function lengthAxis(map, set) {
  return { values: set.supervised, axis: map.length, title: "tokens that bear loss (log)", label: brief };
}

function edgeNote(axis, name) {
  const told = [];
  if (axis.low) told.push(`${plural(axis.low, "example")} with ${name} 0`);
  if (axis.high) told.push(`${plural(axis.high, "example")} with infinite ${name}`);
  if (axis.unknown) told.push(`${plural(axis.unknown, "example")} with unknown ${name}`);
  return told.length ? `Drawn at the edge: ${told.join(", ")}. ` : "";
}

const pictures = []; // all that show the examples, in the same colours

/* What a point's colour can say; continuous ones in 48 shades between the 2nd and the 98th percentile. */
function colours(set) {
  const scales = {
    half: { title: "half", values: set.half, names: HALVES },
    share: { title: "correctness (top-1 share)", values: set.share, ends: [0, 1] },
    source: { title: "source", values: set.source, names: set.sources },
    length: { title: "length (tokens that bear loss)", values: set.supervised, log: true },
    loss: { title: "loss at the last point (nats per token)", values: set.loss },
  };
  const select = make("select", { id: "colour" }, ...Object.entries(scales).map(([name, scale]) =>
    make("option", { value: name, selected: name === "share", disabled: name === "source" && set.sources.length < 2,
      text: name === "source" && set.sources.length < 2 ? "source: all from one" : scale.title })));
  const update = () => {
    const scale = scales[select.value];
    const colour = scale.names ? byName(scale) : byValue(scale);
    for (const picture of pictures) picture.recolour(colour);
    place("map-legend").replaceChildren(scale.names ? nameLegend(scale) : valueLegend(scale));
  };
  select.addEventListener("change", update);
  onTheme(update);
  const touch = make("button", { type: "button", class: "only-touch", "aria-pressed": "false", text: "Lasso by finger" });
  touch.addEventListener("click", () => {
    const on = touch.getAttribute("aria-pressed") === "false";
    for (const picture of pictures) {
      picture.touch = on;
      picture.root.classList.toggle("touch", on);
    }
    touch.setAttribute("aria-pressed", String(on));
  });
  place("map-controls").append(make("label", {}, "colour by ", select), touch);
  update();
}

const OTHERS = 6; // the seventh colour is for all further sources

function byName(scale) {
  return { of: Uint8Array.from(scale.values, (k) => Math.min(k, OTHERS)), bins: () => [0, 1, 2, 3, 4, 5, 6].map(category) };
}

const SHADES = 48;

function ends(scale) {
  if (scale.ends) return scale.ends;
  const ranked = Float64Array.from(scale.values).filter(Number.isFinite).sort();
  if (!ranked.length) return [0, 1];
  const at = (share) => ranked[Math.round(share * (ranked.length - 1))];
  return [at(0.02), at(0.98)];
}

function byValue(scale) {
  const [low, high] = ends(scale), plain = (value) => (scale.log ? Math.log(Math.max(value, 1)) : value);
  const span = plain(high) - plain(low) || 1;
  const of = Uint8Array.from(scale.values, (value) => Math.max(0, Math.min(SHADES - 1, Math.floor((plain(value) - plain(low)) / span * SHADES) || 0)));
  return { of, bins: () => Array.from({ length: SHADES }, (_, k) => viridis((k + 0.5) / SHADES)) };
}

function nameLegend(scale) {
  const sums = scale.names.map((_, k) => scale.values.reduce((sum, value) => sum + (value === k), 0));
  const shown = scale.names.map((name, k) => [name, sums[k], Math.min(k, OTHERS)]).filter(([, sum]) => sum);
  return make("ul", { class: "legend", "aria-label": scale.title }, ...shown.map(([name, sum, k]) =>
    make("li", {}, make("span", { class: `box back-${k}` }), ` ${name || "no name"} (${count(sum)})`)));
}

function valueLegend(scale) {
  const canvas = make("canvas", { width: SHADES, height: 1, "aria-hidden": "true" }), ctx = canvas.getContext("2d");
  for (let k = 0; k < SHADES; k++) {
    ctx.fillStyle = viridis((k + 0.5) / SHADES);
    ctx.fillRect(k, 0, 1, 1);
  }
  const [low, high] = ends(scale), open = scale.ends ? ["", ""] : ["≤ ", "≥ "];
  return make("p", { class: "ramp" }, open[0] + brief(low), canvas, open[1] + brief(high), ` ${scale.title}`);
}

function examplesTable(set, picture) {
  const numeric = (title, values) => ({ title, kind: "number", value: (i) => values[i], cell: (i) => show(values[i]) });
  const id = { title: "id", kind: "text", value: set.id, cell: (i) => make("button", { type: "button", class: "link", dir: "auto", text: set.id(i),
    title: "show in the data map", onclick: () => { picture.point(i, null, true); picture.drawOver(); } }) };
  const columns = [id, { title: "text", kind: "text", class: "text", value: (i) => set.prompt(i) || set.answer(i), cell: (i) => make("div", {}, ...quotes(set.prompt(i), set.answer(i))) },
    numeric("confidence", set.confidence)];
  if (set.variability) columns.push(numeric("variability", set.variability));
  columns.push(numeric("top-1", set.share), numeric("last loss", set.loss), numeric("tokens", set.supervised),
    { title: "half", kind: "text", value: (i) => HALVES[set.half[i]], cell: (i) => HALVES[set.half[i]] });
  if (set.sources.length > 1) columns.push({ title: "source", kind: "text", value: (i) => set.sources[set.source[i]], cell: (i) => set.sources[set.source[i]] });
  if (!set.has_texts) columns.splice(1, 1);
  return new SortedTable(place("map-table"), { caption: "Examples", columns, size: 25, empty: "no example" });
}

function chosenRows(set, table) {
  const some = set.chosen.places();
  if (some.length) table.show(some, `${plural(some.length, "chosen example")}`);
  else table.show(Array.from({ length: set.n }, (_, i) => i), `All ${plural(set.n, "example")} (none is chosen)`);
}

/* Choosing by numbers: what the lasso does, for the keyboard. */
function rangeForm(set, byVariability) {
  const form = place("map-range");
  const field = (name, text) => make("label", {}, text, make("input", { name, type: "number", step: "any", "aria-label": `${text} in numbers` }));
  const button = (text, call) => make("button", { type: "button", text, onclick: call });
  const half = (k) => button(`${HALVES[k]} half`, () => set.chosen.set(range(set.n).filter((i) => set.half[i] === k)));
  form.append(field("low", "confidence from"), field("high", "to"));
  if (byVariability) form.append(field("least", "variability from"), field("most", "to"));
  form.append(make("button", { type: "submit", text: "Choose" }), half(0), half(1), button("Clear", () => { form.reset(); set.chosen.set([]); }), button("Save ids", () => save(set)));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const bound = (name, other) => (form.elements[name] && form.elements[name].value !== "" ? Number(form.elements[name].value) : other);
    const within = (value, low, high) => value >= low && value <= high;
    set.chosen.set(range(set.n).filter((i) => within(set.confidence[i], bound("low", -Infinity), bound("high", Infinity))
      && (!set.variability || within(set.variability[i], bound("least", -Infinity), bound("most", Infinity)))));
  });
}

function range(size) {
  return Array.from({ length: size }, (_, i) => i);
}

/* The ids of the chosen examples (of all, where none is) as a JSON array. */
function save(set) {
  const some = set.chosen.count ? set.chosen.places() : range(set.n);
  const file = new Blob([JSON.stringify(some.map(set.id), null, 1)], { type: "application/json" });
  const link = make("a", { href: URL.createObjectURL(file), download: "ids.json" });
  link.click();
  URL.revokeObjectURL(link.href);
}
