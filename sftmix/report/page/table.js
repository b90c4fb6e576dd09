"use strict";
/* A table of examples: sorted by a header's button, a page at a time. */

class SortedTable {
  /* columns: {title, kind: "number" | "text", value(i), cell(i) -> Node or text}; rows are places of examples. */
  constructor(mount, { caption, columns, size = 50, empty = "none" }) {
    Object.assign(this, { columns, size, empty, rows: [], first: 0, by: -1, falling: false });
    this.caption = make("caption", { text: caption });
    this.buttons = columns.map((column, i) => {
      const arrow = make("span", { class: "arrow", "aria-hidden": "true" });
      return make("button", { type: "button", class: "sort", onclick: () => this.sort(i) }, column.title, arrow);
    });
    this.heads = columns.map((column, i) =>
      make("th", { scope: "col", class: column.kind === "number" ? "number" : "" }, this.buttons[i]));
    this.body = make("tbody");
    const table = make("table", { class: "examples" }, this.caption, make("thead", {}, make("tr", {}, ...this.heads)), this.body);
    this.back = make("button", { type: "button", text: "Previous", onclick: () => this.turn(-1) });
    this.next = make("button", { type: "button", text: "Next", onclick: () => this.turn(1) });
    this.range = make("span", { class: "range", role: "status" });
    mount.append(scrolling(table, caption), make("div", { class: "paging" }, this.back, this.next, this.range));
  }

  /* The places to show, in their own order until a column is chosen. */
  show(rows, caption) {
    this.given = rows;
    this.caption.textContent = caption;
    this.first = 0;
    this.arrange();
  }

  sort(column) {
    this.falling = this.by === column ? !this.falling : false;
    this.by = column;
    this.first = 0;
    this.arrange();
  }

  turn(pages) {
    this.first = Math.max(0, Math.min(this.first + pages * this.size, this.rows.length - 1));
    this.draw();
  }

  arrange() {
    this.rows = Array.from(this.given);
    if (this.by >= 0) this.rows = sorted(this.rows, this.columns[this.by], this.falling);
    this.heads.forEach((head, i) => {
      const state = i !== this.by ? "none" : this.falling ? "descending" : "ascending";
      head.setAttribute("aria-sort", state);
      this.buttons[i].lastChild.textContent = { none: "", ascending: " ▲", descending: " ▼" }[state];
    });
    this.draw();
  }

  draw() {
    const here = this.rows.slice(this.first, this.first + this.size);
    this.body.replaceChildren(...here.map((i) =>
      make("tr", { "data-at": i }, ...this.columns.map((column) => {
        const cell = make("td", { class: column.kind === "number" ? "number" : column.class || "" });
        cell.append(column.cell(i));
        return cell;
      }))));
    const last = this.first + here.length;
    this.range.textContent = here.length ? `${count(this.first + 1)} to ${count(last)} of ${count(this.rows.length)}` : this.empty;
    this.back.disabled = this.first === 0;
    this.next.disabled = last >= this.rows.length;
  }
}

/* Numbers by size, those that are unknown last either way; texts by letters, then capitals first. Equal ones stay. */
function sorted(rows, column, falling) {
  const sign = falling ? -1 : 1;
  const keys = new Map(rows.map((i) => [i, column.kind === "number" ? column.value(i) : String(column.value(i))]));
  if (column.kind === "number") {
    return rows.sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return x === y ? 0 : sign * (x < y ? -1 : 1);
    });
  }
  const lower = new Map([...keys].map(([i, text]) => [i, text.toLowerCase()]));
  return rows.sort((a, b) => {
    const x = lower.get(a), y = lower.get(b);
    if (x !== y) return sign * (x < y ? -1 : 1);
    return keys.get(a) === keys.get(b) ? 0 : sign * (keys.get(a) < keys.get(b) ? -1 : 1);
  });
}
