"use strict";
/* A scatter of examples on two canvases: points below, lasso and cursor above. Numbers never come back from pixels. */

/* The examples that are chosen, shared by all pictures and the table. */
class Chosen {
  constructor(size) {
    this.flags = new Uint8Array(size);
    this.count = 0;
    this.calls = [];
  }

  onChange(call) {
    this.calls.push(call);
  }

  set(places, { add = false } = {}) {
    if (!add) this.flags.fill(0);
    for (const i of places) this.flags[i] = 1;
    this.told();
  }

  toggle(i) {
    this.flags[i] ^= 1;
    this.told();
  }

  told() {
    this.count = this.flags.reduce((sum, flag) => sum + flag, 0);
    this.calls.forEach((call) => call());
  }

  places() {
    return Array.from(this.flags.keys()).filter((i) => this.flags[i]);
  }
}

/* Even-odd rule; x, y and the corners in the same unit. */
function isInside(x, y, corners) {
  let inside = false;
  for (let i = 0, j = corners.length - 1; i < corners.length; j = i++) {
    const [ax, ay] = corners[i], [bx, by] = corners[j];
    if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
  }
  return inside;
}

/* Where a value stands on an axis, 0 to 1; what is not on a logarithmic one stands at its edges. */
function along(axis, value) {
  if (Number.isNaN(value)) return 0;
  const share = axis.log === false ? (value - axis.from) / (axis.to - axis.from)
    : Math.log(value / axis.from) / Math.log(axis.to / axis.from);
  const at = value <= 0 && axis.log !== false ? 0 : Math.min(1, Math.max(0, share));
  return axis.falling ? 1 - at : at;
}

const MARGIN = { left: 58, right: 54, top: 54, bottom: 46 };
const NEAR = 14; // pixels from the pointer within which a point answers
const CELL = 16;

class Scatter {
  /* x, y: {values, axis: {from, to, counts, log}, title, label(value)}; y falls from the top.
     card(i) gives a node, words(i) a sentence; lines: [{y, text}]; names: [{text, x: 0..1, y: 0..1, align}]. */
  constructor(mount, options) {
    Object.assign(this, { lines: [], names: [], height: 440, lasso: true }, options);
    this.size = this.x.values.length;
    this.base = make("canvas", { "aria-hidden": "true" });
    this.over = make("canvas", { "aria-hidden": "true", class: "over" });
    this.note = make("div", { class: "card", hidden: true });
    this.spoken = make("p", { class: "spoken", role: "status" });
    this.root = make("div", { class: "scatter", tabindex: "0", role: "application", "aria-label": this.label,
      "aria-describedby": this.help }, this.base, this.over, this.note);
    mount.append(this.root, this.spoken);
    this.at = -1; // the point under pointer or cursor
    this.path = [];
    this.touch = false;
    this.byX = null;
    this.colour = { of: new Uint8Array(this.size), bins: () => [style("ink")] };
    this.listen();
    new ResizeObserver(() => this.resize()).observe(this.root);
    onTheme(() => this.draw());
    this.chosen.onChange(() => this.draw());
    this.resize();
  }

  listen() {
    const { over, root } = this;
    const here = (event) => {
      const box = over.getBoundingClientRect();
      return [(event.clientX - box.left) * over.clientWidth / box.width, (event.clientY - box.top) * over.clientHeight / box.height];
    };
    over.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.down = here(event);
      if (this.lasso && (event.pointerType !== "touch" || this.touch)) {
        this.path = [this.down];
        over.setPointerCapture(event.pointerId);
      }
    });
    over.addEventListener("pointermove", (event) => {
      const at = here(event);
      if (this.path.length) {
        this.path.push(at);
        this.point(-1);
      } else this.point(this.nearest(...at), at);
      this.drawOver();
    });
    over.addEventListener("pointerup", (event) => this.lift(here(event), event.shiftKey));
    over.addEventListener("pointercancel", () => this.lift(null, false));
    over.addEventListener("pointerleave", (event) => {
      if (!this.path.length && event.pointerType !== "touch") this.point(-1); // a finger leaves when it is lifted
    });
    root.addEventListener("keydown", (event) => this.key(event));
    root.addEventListener("blur", () => this.point(-1));
  }

  /* The end of a lasso, or a click that chooses one point. */
  lift(at, add) {
    const path = this.path;
    this.path = [];
    if (at !== null && this.down && Math.hypot(at[0] - this.down[0], at[1] - this.down[1]) < 4 && path.length < 8) {
      const i = this.nearest(...at);
      this.point(i, at);
      if (i >= 0 && this.lasso) this.chosen.set([i], { add });
    } else if (at !== null && path.length > 2) {
      const inside = [];
      for (let i = 0; i < this.size; i++) if (isInside(this.px[i], this.py[i], path)) inside.push(i);
      this.chosen.set(inside, { add });
      this.spoken.textContent = `${plural(inside.length, "example")} inside the lasso`;
    }
    this.down = null;
    this.drawOver();
  }

  /* Up and down follow the confidence, left and right the other axis. */
  key(event) {
    const step = { ArrowUp: [-1, "y"], ArrowDown: [1, "y"], ArrowLeft: [-1, "x"], ArrowRight: [1, "x"] }[event.key];
    const far = event.shiftKey ? Math.max(1, Math.round(this.size / 50)) : 1;
    if (step) this.point(this.neighbour(step[0] * far, step[1]), null, true);
    else if ((event.key === " " || event.key === "Enter") && this.at >= 0) this.chosen.toggle(this.at);
    else if (event.key === "Escape") {
      this.path = [];
      this.point(-1);
      this.chosen.set([]);
    } else return;
    event.preventDefault();
    this.drawOver();
  }

  neighbour(step, by) {
    if (this.byX === null) {
      const order = (positions) => Array.from(positions.keys()).sort((a, b) => positions[a] - positions[b] || a - b);
      this.byX = { x: order(this.px), y: order(this.py) };
    }
    const order = this.byX[by];
    const now = this.at < 0 ? (step > 0 ? -step : order.length - step) : order.indexOf(this.at);
    return order[Math.min(order.length - 1, Math.max(0, now + step))];
  }

  resize() {
    const width = this.root.clientWidth, ratio = window.devicePixelRatio || 1;
    if (!width) return;
    const height = Math.min(this.height, Math.max(300, Math.round(width * 0.8)));
    for (const canvas of [this.base, this.over]) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.width = width + "px";
      canvas.style.height = height + "px";
      canvas.getContext("2d").setTransform(canvas.width / width, 0, 0, canvas.height / height, 0, 0);
    }
    this.box = { left: MARGIN.left, top: MARGIN.top, width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    this.root.dataset.box = JSON.stringify(this.box);
    this.place();
    this.draw();
  }

  place() {
    const { left, top, width, height } = this.box;
    this.px = Float64Array.from(this.x.values, (value) => left + width * along(this.x.axis, value));
    this.py = Float64Array.from(this.y.values, (value) => top + height * along(this.y.axis, value));
    this.byX = null;
    this.cells = new Map();
    for (let i = 0; i < this.size; i++) {
      const key = Math.floor(this.px[i] / CELL) * 4096 + Math.floor(this.py[i] / CELL);
      if (!this.cells.has(key)) this.cells.set(key, []);
      this.cells.get(key).push(i);
    }
  }

  nearest(x, y) {
    let best = -1, least = NEAR * NEAR;
    for (let a = Math.floor((x - NEAR) / CELL); a <= Math.floor((x + NEAR) / CELL); a++) {
      for (let b = Math.floor((y - NEAR) / CELL); b <= Math.floor((y + NEAR) / CELL); b++) {
        for (const i of this.cells.get(a * 4096 + b) || []) {
          const far = (this.px[i] - x) ** 2 + (this.py[i] - y) ** 2;
          if (far < least) [best, least] = [i, far];
        }
      }
    }
    return best;
  }

  /* Shows an example's card; the keyboard's is also spoken. */
  point(i, at = null, speak = false) {
    if (i !== this.at) {
      this.at = i;
      this.note.hidden = i < 0;
      if (i >= 0) this.note.replaceChildren(this.card(i));
      if (speak) this.spoken.textContent = i < 0 ? "" : this.words(i) + (this.chosen.flags[i] ? ", chosen" : "");
      this.drawOver();
    }
    if (i < 0) return;
    const [x, y] = at || [this.px[i], this.py[i]];
    const width = this.root.clientWidth, card = this.note.offsetWidth;
    const left = x + 16 + card <= width ? x + 16 : Math.max(0, Math.min(width - card, x - 16 - card));
    this.note.style.left = left + "px";
    this.note.style.top = (left > x || left + card < x ? Math.max(0, y - 20) : y + 18) + "px";
  }

  recolour(colour) {
    this.colour = colour;
    this.draw();
  }

  draw() {
    if (!this.box) return;
    const ctx = this.base.getContext("2d");
    ctx.clearRect(0, 0, this.root.clientWidth, this.root.clientHeight);
    this.drawAxes(ctx);
    const many = this.size > 5000, dot = this.size > 20000 ? 1.8 : many ? 2.4 : this.size > 500 ? 4 : 7;
    const colours = this.colour.bins(), some = this.chosen.count > 0;
    for (const isChosen of some ? [0, 1] : [0]) {
      ctx.globalAlpha = some ? (isChosen ? 1 : 0.18) : many ? 0.6 : 0.8;
      const groups = colours.map(() => []);
      for (let i = 0; i < this.size; i++) if (this.chosen.flags[i] === isChosen) groups[this.colour.of[i]].push(i);
      groups.forEach((places, bin) => this.dots(ctx, places, colours[bin], isChosen ? dot * 1.3 : dot, many));
      if (isChosen && this.chosen.count <= 200) {
        ctx.strokeStyle = style("ink");
        ctx.lineWidth = 1;
        groups.flat().forEach((i) => this.ring(ctx, i, dot * 0.65 + 1.5));
      }
    }
    ctx.globalAlpha = 1;
    this.drawLines(ctx);
    this.drawOver();
  }

  dots(ctx, places, colour, size, square) {
    ctx.fillStyle = colour;
    ctx.beginPath();
    for (const i of places) {
      if (square) ctx.rect(this.px[i] - size / 2, this.py[i] - size / 2, size, size);
      else {
        ctx.moveTo(this.px[i] + size / 2, this.py[i]);
        ctx.arc(this.px[i], this.py[i], size / 2, 0, 7);
      }
    }
    ctx.fill();
  }

  ring(ctx, i, radius) {
    ctx.beginPath();
    ctx.arc(this.px[i], this.py[i], radius, 0, 7);
    ctx.stroke();
  }

  drawAxes(ctx) {
    const { left, top, width, height } = this.box;
    ctx.font = "12px " + style("plain");
    ctx.lineWidth = 1;
    const across = Math.max(3, Math.floor(width / 80)), down = Math.max(3, Math.floor(height / 50));
    ctx.textAlign = "center";
    for (const value of ticks(this.x.axis.from, this.x.axis.to, this.x.axis.log !== false, across)) {
      const x = left + width * along(this.x.axis, value);
      this.line(ctx, x, top, x, top + height, style("grid"));
      this.write(ctx, this.x.label(value), x, top + height + 17, style("soft"));
    }
    ctx.textAlign = "right";
    for (const value of ticks(this.y.axis.from, this.y.axis.to, this.y.axis.log !== false, down)) {
      const y = top + height * along(this.y.axis, value);
      this.line(ctx, left, y, left + width, y, style("grid"));
      this.write(ctx, this.y.label(value), left - 7, y + 4, style("soft"));
    }
    this.line(ctx, left, top + height, left + width, top + height, style("soft"));
    this.line(ctx, left, top, left, top + height, style("soft"));
    ctx.textAlign = "center";
    this.write(ctx, this.x.title, left + width / 2, top + height + 38, style("ink"));
    ctx.save();
    ctx.translate(13, top + height / 2);
    ctx.rotate(-Math.PI / 2);
    this.write(ctx, this.y.title, 0, 0, style("ink"));
    ctx.restore();
    this.drawMargins(ctx);
  }

  /* Histograms of all examples along the axes, in the axes' own parts. */
  drawMargins(ctx) {
    const { left, top, width, height } = this.box;
    const upper = this.x.axis.counts, side = this.y.axis.halves || [this.y.axis.counts];
    ctx.fillStyle = style("soft");
    if (upper) {
      const most = Math.max(1, ...upper), each = width / upper.length;
      upper.forEach((n, k) => ctx.fillRect(left + k * each, top - 6 - 42 * n / most, Math.max(0.5, each - 1), 42 * n / most));
    }
    if (!side[0]) return;
    const each = height / side[0].length;
    const most = Math.max(1, ...side[0].map((_, k) => side.reduce((sum, part) => sum + part[k], 0)));
    const fills = [style("series-0"), style("series-1"), style("soft")];
    for (let k = 0; k < side[0].length; k++) {
      let from = left + width + 6;
      side.forEach((part, half) => {
        const size = 42 * part[k] / most;
        ctx.fillStyle = side.length > 1 ? fills[half] : style("soft");
        ctx.fillRect(from, top + k * each, size, Math.max(0.5, each - 1));
        from += size;
      });
    }
  }

  drawLines(ctx) {
    const { left, top, width, height } = this.box;
    ctx.font = "12px " + style("plain");
    ctx.textAlign = "left";
    for (const { y: value, text } of this.lines) {
      const y = top + height * along(this.y.axis, value);
      ctx.setLineDash([6, 4]);
      this.line(ctx, left, y, left + width, y, style("ink"));
      ctx.setLineDash([]);
      this.labelled(ctx, text, left + width - 4, y - 6, "right");
    }
    // In a narrow picture those of the right stand above those of the left.
    for (const { text, x, y, align } of this.names) {
      const raised = align === "right" && width < 330 ? 18 : 0;
      this.labelled(ctx, text, left + x * width, top + y * height - raised, align);
    }
  }

  /* Text on the page's ground, so that it is read above the points. */
  labelled(ctx, text, x, y, align) {
    ctx.textAlign = align;
    ctx.lineWidth = 4;
    ctx.lineJoin = "round";
    ctx.strokeStyle = style("ground");
    ctx.strokeText(text, x, y);
    this.write(ctx, text, x, y, style("ink"));
  }

  drawOver() {
    const ctx = this.over.getContext("2d");
    ctx.clearRect(0, 0, this.root.clientWidth, this.root.clientHeight);
    ctx.strokeStyle = style("ink");
    ctx.lineWidth = 2;
    if (this.at >= 0 && this.px) this.ring(ctx, this.at, 7);
    if (this.path.length < 2) return;
    ctx.setLineDash([5, 4]);
    ctx.beginPath();
    this.path.forEach(([x, y]) => ctx.lineTo(x, y));
    ctx.closePath();
    ctx.stroke();
    ctx.fillStyle = style("lasso");
    ctx.fill();
    ctx.setLineDash([]);
  }

  line(ctx, ax, ay, bx, by, colour) {
    ctx.strokeStyle = colour;
    ctx.lineWidth = 1;
    ctx.beginPath();
    ctx.moveTo(ax, ay);
    ctx.lineTo(bx, by);
    ctx.stroke();
  }

  write(ctx, text, x, y, colour) {
    ctx.fillStyle = colour;
    ctx.fillText(text, x, y);
  }
}
