// The live view: draws the state that memo/inspection/live_view.py makes. A section is drawn again
// only when its part of the state changed, so that focus, scrolling and clicks survive the updates.

import { make } from "./elements.js";
import { plot } from "./plot.js";

const ORDERS = ["newest", "oldest", "size", "cost"];
const BUSY = "Working…";

export class View {
  constructor(root, send) {
    this.root = root;
    this.send = send;
    this.drawn = {};
    this.sorted = {};
    this.chosen = null;
    this.waiting = new Map();
    root.classList.add("memo-live");
    const part = (name, title) => {
      const section = make("section", root, { className: `memo-${name}`, "aria-label": title });
      make("h2", section, { text: title });
      return make("div", section);
    };
    this.head = make("header", root);
    this.graph = part("graph", "Graph");
    this.running = part("running", "Under way");
    this.functions = part("functions", "Functions");
    this.entries = part("entries", "Entries");
    this.tools();
    this.tiers = part("tiers", "Tiers");
    root.addEventListener("click", (event) => this.clicked(event));
    root.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      if (event.target.closest("[data-sort],[data-node]")) {
        event.preventDefault();
        this.clicked(event);
      }
    });
  }

  tools() {
    const bar = make("div", null, { className: "memo-tools" });
    this.filter = make("input", bar, {
      type: "search", placeholder: "Filter by name, argument, state", "aria-label": "Filter",
    });
    this.order = make("select", bar, { "aria-label": "First" });
    for (const name of ORDERS) make("option", this.order, { text: name, value: name });
    const show = () => this.send({ do: "show", filter: this.filter.value, order: this.order.value });
    let pause;
    this.filter.addEventListener("input", () => {
      clearTimeout(pause);
      pause = setTimeout(show, 200);
    });
    this.order.addEventListener("change", show);
    this.count = make("span", bar, { className: "memo-dim", role: "status" });
    this.entries.before(bar);
  }

  update(state) {
    if (!state || !state.functions) return;
    this.state = state;
    for (const [target, before] of this.waiting) {
      if (state.answers?.[target] !== before) this.waiting.delete(target);
    }
    const said = { ...state.said };
    for (const target of this.waiting.keys()) said[target] = BUSY;
    this.part("head", [state.headline, state.error, state.shared], () => this.drawHead(state));
    this.part("graph", [state.graph, this.chosen, said], () => this.drawGraph(state, said));
    this.part("running", state.running, () => this.drawRunning(state));
    this.part("functions", [state.functions, said, this.sorted.functions],
      () => this.drawFunctions(state, said));
    this.part("entries", [state.entries, said, this.sorted.entries],
      () => this.drawEntries(state, said));
    this.part("tiers", state.tiers, () => this.drawTiers(state));
  }

  part(name, facts, redraw) {
    const text = JSON.stringify(facts);
    if (this.drawn[name] === text) return;
    this.drawn[name] = text;
    const focus = document.activeElement?.dataset?.focus ?? this.shadowFocus();
    redraw();
    if (focus) this.root.querySelector(`[data-focus="${CSS.escape(focus)}"]`)?.focus();
  }

  shadowFocus() {
    return this.root.getRootNode()?.activeElement?.dataset?.focus;
  }

  act(what, target, message) {
    this.waiting.set(target, this.state.answers?.[target]);
    this.send({ do: what, ...message });
    this.update(this.state);
  }

  clicked(event) {
    const sort = event.target.closest("[data-sort]");
    const node = event.target.closest("[data-node]");
    const button = event.target.closest("[data-do]");
    if (sort) {
      const [name, column] = sort.dataset.sort.split("/");
      const old = this.sorted[name];
      this.sorted[name] = { column: Number(column), up: old?.column === Number(column) && !old.up };
      this.update(this.state);
    } else if (node) {
      this.chosen = this.chosen === node.dataset.node ? null : node.dataset.node;
      this.update(this.state);
    } else if (button && !button.disabled) {
      const { do: what, key, function: name } = button.dataset;
      this.act(what, key || name, key ? { key } : { function: name });
    }
  }

  drawHead({ headline, error, shared }) {
    this.head.replaceChildren();
    make("strong", this.head, { text: "memo" });
    make("span", this.head, { text: ` ${headline}` });
    const where = shared ? "every process of this directory" : "this notebook";
    make("span", this.head, { text: ` · ${where}`, className: "memo-dim" });
    if (error) make("p", this.head, { text: error, className: "memo-bad", role: "alert" });
  }

  button(parent, what, text, title, target, off) {
    const made = make("button", parent, { text, title: off || title, type: "button" });
    made.dataset.do = what;
    Object.assign(made.dataset, target);
    made.dataset.focus = `${what} ${target.key || target.function}`;
    made.disabled = Boolean(off);
  }

  actions(parent, row, said) {
    const target = { key: row.key };
    const cell = make("td", parent, { className: "memo-actions memo-text" });
    this.button(cell, "refresh", "Refresh", "compute it again, in the background", target, row.why);
    this.button(cell, "invalidate", "Invalidate", "drop it, and what is built on it", target);
    this.button(cell, "explain", "Explain", "its state, and how it came to be", target);
    if (said) make("p", cell, { text: said, className: "memo-said", role: "status" });
  }

  drawGraph({ graph, entries }, said) {
    this.graph.replaceChildren();
    if (!graph.svg) {
      make("p", this.graph, { text: graph.text || "Nothing yet.", className: "memo-dim" });
      return;
    }
    const drawing = document.importNode(
      new DOMParser().parseFromString(graph.svg, "image/svg+xml").documentElement, true);
    make("div", this.graph, { className: "memo-wide" }).append(drawing);
    for (const node of drawing.querySelectorAll(".memo-node")) {
      node.setAttribute("tabindex", "0");
      node.setAttribute("role", "button");
      node.dataset.node = node.dataset.id;
      node.dataset.focus = `node ${node.dataset.id}`;
      if (node.dataset.id !== this.chosen) continue;
      node.classList.add("memo-chosen");
      const panel = make("div", this.graph, { className: "memo-panel" });
      for (const line of node.querySelector("title").textContent.split("\n")) {
        make("p", panel, { text: line });
      }
      const key = node.dataset.key;
      const row = key && entries.rows.find((one) => one.key === key);
      if (row) {
        this.actions(panel, row, said[key]);
      } else {
        const name = node.dataset.function;
        this.button(panel, "invalidate", "Invalidate all of it",
          "drop every entry of the function", { function: name });
        if (said[name]) make("p", panel, { text: said[name], className: "memo-said" });
      }
    }
  }

  drawRunning({ running }) {
    this.running.replaceChildren();
    if (!running.length) {
      make("p", this.running, { text: "Nothing is being computed.", className: "memo-dim" });
      return;
    }
    const list = make("ul", this.running);
    for (const run of running) {
      const item = make("li", list);
      make("code", item, { text: run.call });
      const end = run.about ? ` of about ${run.about}` : " so far";
      const where = run.where ? ` · ${run.where}` : "";
      make("span", item, { text: ` ${run.doing}, ${run.spent}${end}${where}` });
      if (run.share !== null) {
        make("progress", item, { value: run.share, max: 1, "aria-label": run.call });
      }
    }
  }

  table(parent, name, { titles, texts, rows }, more) {
    const sorted = this.sorted[name];
    const made = make("table", make("div", parent, { className: "memo-wide", tabindex: "0" }));
    const head = make("tr", make("thead", made));
    titles.forEach((title, at) => {
      const cell = make("th", head, { text: title, scope: "col", tabindex: "0" });
      if (at < texts) cell.classList.add("memo-text");
      cell.dataset.sort = `${name}/${at}`;
      cell.dataset.title = title;
      cell.dataset.focus = `sort ${name} ${at}`;
      if (sorted?.column === at) {
        cell.setAttribute("aria-sort", sorted.up ? "ascending" : "descending");
      }
    });
    for (const title of more) {
      make("th", head, { text: title, scope: "col", className: "memo-text" }).dataset.title = title;
    }
    const value = (row) => {
      const found = row.cells[sorted.column].value;
      return found === "Infinity" ? Infinity : found;
    };
    const shown = sorted ? rows.toSorted((a, b) => {
      const [x, y] = [value(a), value(b)];
      return (x < y ? -1 : x > y ? 1 : 0) * (sorted.up ? 1 : -1);
    }) : rows;
    const body = make("tbody", made);
    return shown.map((row) => {
      const line = make("tr", body);
      row.cells.forEach((cell, at) => {
        const kind = at ? "td" : "th";
        const box = make(kind, line, { text: cell.text });
        if (!at) box.scope = "row";
        if (at < texts) box.classList.add("memo-text");
        if (titles[at] === "state") box.dataset.state = cell.text;
        box.dataset.title = titles[at];
        if (cell.note) make("small", box, { text: cell.note });
      });
      return [row, line];
    });
  }

  drawFunctions({ functions }, said) {
    this.functions.replaceChildren();
    if (!functions.rows.length) {
      const text = "No cached function was called yet. Put @cache above a function and call it.";
      make("p", this.functions, { text, className: "memo-dim" });
      return;
    }
    for (const [row, line] of this.table(this.functions, "functions", functions, ["over time", ""])) {
      const box = make("td", line);
      box.dataset.title = "over time";
      plot(box, row.plot);
      const cell = make("td", line, { className: "memo-actions memo-text" });
      this.button(cell, "invalidate", "Invalidate", "drop every entry of it",
        { function: row.function });
      const told = said[row.function];
      if (told) make("p", cell, { text: told, className: "memo-said", role: "status" });
    }
  }

  drawEntries({ entries }, said) {
    const { rows, count } = entries;
    this.count.textContent = rows.length < count ? `${rows.length} of ${count}` : `${count}`;
    this.entries.replaceChildren();
    if (!rows.length) {
      const text = this.filter.value ? "No entry matches the filter." : "No entries.";
      make("p", this.entries, { text, className: "memo-dim" });
      return;
    }
    for (const [row, line] of this.table(this.entries, "entries", entries, ["value", ""])) {
      make("td", line, { text: row.preview, className: "memo-text memo-preview" })
        .dataset.title = "value";
      this.actions(line, row, said[row.key]);
    }
  }

  drawTiers({ tiers }) {
    this.tiers.replaceChildren();
    const list = make("dl", this.tiers);
    for (const [name, said, well] of tiers) {
      make("dt", list, { text: name, className: well ? "" : "memo-bad" });
      make("dd", list, { text: said });
    }
  }
}
