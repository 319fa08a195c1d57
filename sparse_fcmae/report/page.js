"use strict";
// Draws what the record says. All text goes through textContent, so that a name is never taken for markup.

const view = {
  x: "epoch", logs: new Set(), hidden: new Set(), open: new Set(),
  cursors: new Map(), painted: new Set(), brush: true, run: 0, step: null, wipe: 50, left: "masked", right: "filled in", theme: "system",
};
const TITLES = { // of pictures that other commands have drawn
  mistakes: "Wrong, and most certain", collapse: "Distance between channels, block by block", spectrum: "Spectrum of the embeddings",
};
const drawn = new Map(); // what each section shows, as JSON
const pictures = new Map(); // images by their address
let record = JSON.parse(document.getElementById("record").textContent);

// ---- elements

function add(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const el = (tag, attributes = {}, ...children) => add(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  add(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const colour = (run) => `var(--c${run % 7})`;
const size = (bytes) => (bytes < 1e6 ? `${number(bytes / 1e3)} kB` : `${number(Math.round(bytes / 1e5) / 10)} MB`);
const key = (run) => el("span", { class: "key", style: `background: ${colour(run)}` });

function number(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e9) return value.toExponential(2);
  return Number(value.toPrecision(5)).toLocaleString("en", { maximumFractionDigits: 6 });
}

function words(value) {
  if (value === null || value === undefined) return "–";
  return typeof value === "string" ? value : JSON.stringify(value);
}

function table(head, rows) {
  const line = (cells, tag) => el("tr", { class: cells.differs ? "differs" : null },
    ...cells.map((cell, i) => el(tag, i || tag === "td" ? {} : { scope: "col" }, cell)));
  return el("div", { class: "table" },
    el("table", {}, el("thead", {}, line(head, "th")), el("tbody", {}, ...rows.map((row) => line(row, "td")))));
}

function details(id, title, ...children) {
  const toggle = (event) => view.open[event.target.open ? "add" : "delete"](id);
  return el("details", { id, open: view.open.has(id), ontoggle: toggle }, el("summary", {}, title), ...children);
}

function choice(id, label, values, chosen, change) {
  const options = values.map(([value, text]) => el("option", { value, selected: value === chosen }, text));
  return el("label", {}, `${label} `, el("select", { id, onchange: (event) => change(event.target.value) }, ...options));
}

// ---- charts

function ticks(low, high, log) {
  if (log && high / low >= 100) {
    const powers = [];
    const every = Math.max(1, Math.ceil(Math.log10(high / low) / 6));
    for (let p = Math.ceil(Math.log10(low)); p <= Math.log10(high); p += every) powers.push(10 ** p);
    return powers;
  }
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-9); i++) found.push(i * step);
  return found;
}

class Chart {
  constructor(name, title, lines, mark) {
    Object.assign(this, { name, title, lines, mark, cursor: view.cursors.get(name) ?? null });
    this.positive = lines.every((line) => (line.low ?? line.value).every((value) => value > 0));
    const toggle = () => {
      view.logs.has(name) ? view.logs.delete(name) : view.logs.add(name);
      button.setAttribute("aria-pressed", view.logs.has(name));
      this.draw();
    };
    const button = el("button", {
      id: `log-${name}`, type: "button", "aria-pressed": view.logs.has(name), onclick: toggle, hidden: !this.positive,
    }, "logarithmic");
    this.svg = svg("svg", {
      id: `chart-${name}`, tabindex: 0, role: "img",
      onpointermove: (event) => this.point(event), onpointerleave: () => this.show(null),
      onkeydown: (event) => this.walk(event),
    });
    this.readout = el("output", { "aria-live": "polite" });
    this.figure = el("figure", { class: "chart" }, el("figcaption", {}, title, button), this.svg, this.readout);
    new ResizeObserver(() => this.draw()).observe(this.figure);
  }

  get visible() {
    return this.lines.filter((line) => !view.hidden.has(line.run));
  }

  draw() {
    const width = this.svg.clientWidth || 400, height = this.svg.clientHeight || 208;
    const lines = this.visible, log = this.positive && view.logs.has(this.name);
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    if (!lines.length) return this.show(null);
    let [right, low, high] = [0, Infinity, -Infinity];
    for (const line of lines) {
      for (const x of line[view.x]) right = Math.max(right, x);
      for (const y of line.low ?? line.value) low = Math.min(low, y);
      for (const y of line.high ?? line.value) high = Math.max(high, y);
    }
    this.svg.setAttribute("aria-label", `${this.title}: between ${number(low)} and ${number(high)}`);
    right ||= 1;
    if (high === low) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
    const f = log ? Math.log : (value) => value;
    const room = (f(high) - f(low)) * 0.05;
    const [bottom, top] = [f(low) - room, f(high) + room];
    this.left = 56;
    this.x = (value) => this.left + (value / right) * (width - this.left - 8);
    this.y = (value) => height - 22 - ((f(value) - bottom) / (top - bottom)) * (height - 32);
    for (const value of ticks(low, high, log)) {
      this.svg.append(svg("line", { class: "grid", x1: this.left, x2: width - 8, y1: this.y(value), y2: this.y(value) }));
      this.svg.append(svg("text", { x: this.left - 6, y: this.y(value) + 4, "text-anchor": "end" }, number(value)));
    }
    for (const value of ticks(0, right, false)) {
      this.svg.append(svg("text", { x: this.x(value), y: height - 6, "text-anchor": "middle" }, number(value)));
    }
    if (this.mark && this.mark.value >= low && this.mark.value <= high) {
      const y = this.y(this.mark.value);
      this.svg.append(svg("line", { class: "mark", x1: this.left, x2: width - 8, y1: y, y2: y }));
      this.svg.append(svg("text", { x: width - 8, y: y + 13, "text-anchor": "end" }, this.mark.text));
    }
    for (const line of lines) this.svg.append(...this.curve(line));
    this.show(this.cursor);
  }

  curve(line) {
    const xs = line[view.x], at = (values) => values.map((y, i) => `${this.x(xs[i]).toFixed(1)},${this.y(y).toFixed(1)}`);
    const stroke = colour(line.run), parts = [], main = at(line.value);
    const several = this.lines.some((other) => other.run === line.run && other !== line && other.value.length > line.value.length);
    if (line.low) {
      const band = [...at(line.low), ...at(line.high).reverse()];
      parts.push(svg("polygon", { points: band.join(" "), fill: stroke, opacity: 0.15 }));
    }
    parts.push(svg("polyline", {
      points: main.join(" "), fill: "none", stroke, "stroke-width": several ? 2.5 : 1.5, "stroke-linejoin": "round",
      opacity: this.lines.some((other) => other.run === line.run && other.value.length < line.value.length) ? 0.55 : 1,
      "stroke-dasharray": line.dashed ? "6 4" : null,
    }));
    if (xs.length <= 40) {
      parts.push(...xs.map((x, i) => svg("circle", { cx: this.x(x), cy: this.y(line.value[i]), r: 3, fill: stroke })));
    }
    return parts;
  }

  nearest(line, x) {
    const xs = line[view.x];
    let [first, last] = [0, xs.length - 1];
    while (last - first > 1) {
      const middle = (first + last) >> 1;
      if (xs[middle] < x) first = middle; else last = middle;
    }
    return Math.abs(xs[first] - x) <= Math.abs(xs[last] - x) ? first : last;
  }

  show(x) {
    this.cursor = x;
    view.cursors.set(this.name, x);
    this.svg.querySelector(".cursor")?.remove();
    const lines = this.visible;
    if (x === null || !lines.length) return this.readout.replaceChildren();
    this.svg.append(svg("line", { class: "cursor", x1: this.x(x), x2: this.x(x), y1: 6, y2: this.svg.clientHeight - 22 }));
    this.readout.replaceChildren(...lines.map((line) => {
      const i = this.nearest(line, x);
      const range = line.low ? `, of ${line.each} from ${number(line.low[i])} to ${number(line.high[i])}` : "";
      const name = [record.runs.length > 1 ? record.runs[line.run].name : "", line.label].filter(Boolean).join(", ");
      const where = `step ${number(line.step[i])}, epoch ${number(line.epoch[i])}`;
      return el("div", {}, key(line.run), `${name ? `${name}: ` : ""}${number(line.value[i])}${range} at ${where}`);
    }));
  }

  point(event) {
    const lines = this.visible;
    if (!lines.length) return;
    const place = event.clientX - this.svg.getBoundingClientRect().left;
    const right = Math.max(...lines.map((line) => line[view.x].at(-1)));
    this.show(Math.min(1, Math.max(0, (place - this.left) / (this.x(right) - this.left))) * right);
  }

  walk(event) {
    const line = this.visible.reduce((most, other) => (most && most.value.length >= other.value.length ? most : other), null);
    if (!line || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    const xs = line[view.x], here = this.cursor === null ? -1 : this.nearest(line, this.cursor);
    const next = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: xs.length - 1 }[event.key];
    this.show(xs[Math.min(xs.length - 1, Math.max(0, next))]);
  }
}

function charts(runs) {
  const found = new Map();
  runs.forEach((run, number) => run.charts.forEach(({ name, title, lines, mark, detail }) => {
    if (detail && runs.length > 1) return;
    if (!found.has(name)) found.set(name, { title, mark, lines: [] });
    found.get(name).lines.push(...lines.map((line) => ({ ...line, run: number })));
  }));
  if (!found.size) return [el("h2", {}, "Over time"), el("p", {}, "No step is recorded yet.")];
  const all = [...found].map(([name, { title, lines, mark }]) => new Chart(name, title, lines, mark));
  const redraw = () => all.forEach((chart) => chart.draw());
  const show = (event, run) => {
    view.hidden[event.target.checked ? "delete" : "add"](run);
    redraw();
  };
  const boxes = runs.length < 2 ? [] : runs.map((run, i) => el("label", {},
    el("input", { id: `show-${i}`, type: "checkbox", checked: !view.hidden.has(i), onchange: (event) => show(event, i) }),
    " ", key(i), run.name));
  const over = choice("over", "over", [["epoch", "epochs"], ["step", "steps"]], view.x, (value) => {
    view.x = value;
    all.forEach((chart) => { chart.cursor = null; });
    redraw();
  });
  const more = runs.length > 1 && runs.some((run) => run.charts.some(({ detail }) => detail));
  const thinned = [...found.values()].some(({ lines }) => lines.some((line) => line.each > 1));
  return [
    el("h2", {}, "Over time"),
    el("div", { class: "controls" }, over, ...boxes),
    thinned ? el("p", { class: "soft" }, "Lines are means of several steps, and bands reach from the least to the greatest of them.") : null,
    more ? el("p", { class: "soft" }, "The page of a single run also shows the distance between channels block by block.") : null,
    el("div", { class: "charts" }, ...all.map((chart) => chart.figure)),
  ];
}

// ---- pictures of what the model fills in

function image(source, loaded) {
  if (!pictures.has(source)) {
    const picture = new Image();
    picture.src = source;
    pictures.set(source, picture);
  }
  const picture = pictures.get(source);
  if (picture.complete) loaded(picture); else picture.addEventListener("load", () => loaded(picture), { once: true });
}

function reconstructions(runs) {
  const having = runs.map((run, i) => [i, run]).filter(([, run]) => run.reconstructions);
  if (!having.length) return [];
  if (!having.some(([i]) => i === view.run)) view.run = having[0][0];
  const { columns, tiles, steps, of } = runs[view.run].reconstructions;
  const newest = view.step === null || !steps.some(({ step }) => step === view.step);
  const start = newest ? steps.length - 1 : steps.findIndex(({ step }) => step === view.step);
  const canvases = tiles.map((row, i) => el("canvas", {
    width: row[0][2], height: row[0][3], role: "img", "aria-label": `image ${i + 1}`,
    onpointerdown: (event) => drag(event), onpointermove: (event) => event.buttons && drag(event),
  }));
  const label = el("span");
  const step = el("input", {
    id: "step", type: "range", min: 0, max: steps.length - 1, value: start, "aria-label": "checkpoint",
    disabled: steps.length < 2, oninput: () => draw(true),
  });
  const wipe = el("input", {
    id: "wipe", type: "range", min: 0, max: 100, value: view.wipe, "aria-label": "where the two pictures meet",
    oninput: () => draw(false),
  });
  function drag(event) {
    const box = event.target.getBoundingClientRect();
    wipe.value = (100 * (event.clientX - box.left)) / box.width;
    draw(false);
  }
  function draw(chosen) {
    const now = steps[step.value];
    view.wipe = Number(wipe.value);
    if (chosen) view.step = Number(step.value) === steps.length - 1 ? null : now.step;
    label.textContent = `step ${number(now.step)}`;
    image(now.source, (sheet) => {
      if (steps[step.value] !== now) return;
      tiles.forEach((row, i) => {
        const context = canvases[i].getContext("2d"), [, , width, height] = row[0];
        const edge = Math.round((view.wipe / 100) * width);
        const part = (name, from, to) => {
          const [left, top] = row[columns.indexOf(name)];
          if (to > from) context.drawImage(sheet, left + from, top, to - from, height, from, 0, to - from, height);
        };
        part(view.left, 0, edge);
        part(view.right, edge, width);
        if (edge > 0 && edge < width) {
          context.fillStyle = "#fff";
          context.fillRect(edge - 1, 0, 2, height);
        }
      });
    });
  }
  const side = (name) => choice(name, name, columns.map((column) => [column, column]), view[name], (value) => {
    view[name] = value;
    draw(false);
  });
  const whose = having.length < 2 ? null : choice("whose", "run", having.map(([i, run]) => [String(i), run.name]),
    String(view.run), (value) => {
      [view.run, view.step, view.painted] = [Number(value), null, new Set()];
      section("reconstructions", record.runs, reconstructions, true);
    });
  draw(false);
  return [
    el("h2", {}, "What the model fills in"),
    el("div", { class: "controls" }, whose, el("label", { for: "step" }, "checkpoint"), step, label),
    el("div", { class: "controls" }, side("left"), wipe, side("right")),
    steps.length < of ? el("p", { class: "soft" }, `${steps.length} of ${of} pictures, evenly spread; the others are in the run's folder.`) : null,
    el("div", { class: "tiles" }, ...canvases),
    details("paint", "paint a mask", ...painter(runs[view.run])),
  ];
}

function painter({ folder, reconstructions: { columns, tiles, steps, grid: [rows, cols] } }) {
  const hidden = view.painted, [left, top, width, height] = tiles[0][columns.indexOf("original")];
  const back = el("canvas", { width, height });
  image(steps.at(-1).source, (sheet) => back.getContext("2d").drawImage(sheet, left, top, width, height, 0, 0, width, height));
  const paint = (cell, number) => {
    hidden[view.brush ? "add" : "delete"](number);
    cell.setAttribute("aria-pressed", view.brush);
  };
  const begin = (cell, number) => {
    view.brush = !hidden.has(number);
    paint(cell, number);
  };
  const cells = Array.from({ length: rows * cols }, (_, number) => el("button", {
    type: "button", "aria-pressed": hidden.has(number),
    "aria-label": `patch in row ${Math.floor(number / cols) + 1}, column ${(number % cols) + 1}`,
    onpointerdown: (event) => event.button === 0 && begin(event.target, number),
    onpointerenter: (event) => event.buttons === 1 && paint(event.target, number),
    onkeydown: (event) => [" ", "Enter"].includes(event.key) && begin(event.target, number),
  }));
  const save = () => {
    const picture = el("canvas", { width: cols, height: rows }), context = picture.getContext("2d");
    for (let number = 0; number < rows * cols; number++) {
      context.fillStyle = hidden.has(number) ? "#fff" : "#000";
      context.fillRect(number % cols, Math.floor(number / cols), 1, 1);
    }
    el("a", { href: picture.toDataURL(), download: "mask.png" }).click();
  };
  return [
    el("p", { class: "soft" }, "Click the patches to hide, or drag over them. Save the mask, and the command draws what the model fills in."),
    el("div", { class: "painter" }, back, el("div", { style: `grid-template-columns: repeat(${cols}, 1fr)` }, ...cells)),
    el("p", { class: "controls" }, el("button", { id: "save-mask", type: "button", onclick: save }, "save mask.png")),
    el("pre", {}, `sparse-fcmae reconstruct --init ${folder} --data IMAGES --mask mask.png --out painted.png`),
  ];
}

// ---- tables and pictures

const cards = (named) => el("dl", { class: "facts" },
  ...named.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));

function facts(runs) {
  return runs.flatMap((run, i) => [
    runs.length > 1 ? el("h3", {}, key(i), run.name) : null,
    el("p", { class: "soft" }, `${run.task}, ${run.folder}`),
    run.verdict ? el("p", { class: "verdict", "data-state": run.verdict.state },
      el("b", {}, run.verdict.state), `: ${run.verdict.reason}`) : null,
    ...run.notes.map((note) => el("p", {}, note)),
    cards(run.facts),
  ]);
}

function ofEach(title, runs, part, build) {
  const having = runs.filter((run) => run[part] && (!Array.isArray(run[part]) || run[part].length));
  if (!having.length) return [];
  return [el("h2", {}, title), ...having.flatMap((run) => [runs.length > 1 ? el("h3", {}, run.name) : null, ...build(run)])];
}

const images = (found) => found.flatMap(({ name, source }) =>
  [el("h3", {}, TITLES[name] ?? name), el("p", { class: "pictures" }, el("img", { src: source, alt: name }))]);

function evaluation(runs) {
  return ofEach("Evaluation", runs, "evaluation", ({ name, evaluation: { facts, tables, confusion, pictures } }) => {
    return [
      cards(facts),
      confusion ? matrix(confusion) : null,
      ...images(pictures),
      ...Object.entries(tables).map(([title, values]) => details(`${name}-${title}`, title, table(["name", "value"],
        Object.entries(values).sort((a, b) => (a[1] ?? 0) - (b[1] ?? 0)).map(([of, value]) => [of, number(value)])))),
    ];
  });
}

function matrix({ classes, counts }) {
  const size = classes.length, cell = Math.max(1, Math.floor(420 / size)), totals = Array(size).fill(0);
  for (const [t, , n] of counts) totals[t] += n;
  const canvas = el("canvas", { width: size * cell, height: size * cell, role: "img", "aria-label": "confusion matrix" });
  const context = canvas.getContext("2d"), at = new Map(counts.map(([t, p, n]) => [t * size + p, n]));
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  for (const [t, p, n] of counts) {
    const share = n / totals[t];
    context.fillStyle = `rgb(${255 - 247 * share}, ${255 - 207 * share}, ${255 - 148 * share})`;
    context.fillRect(p * cell, t * cell, cell, cell);
  }
  const readout = el("output", {}, "Rows are true classes, columns are predicted ones.");
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const [p, t] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]
      .map((part) => Math.min(size - 1, Math.max(0, Math.floor(part * size))));
    readout.textContent = `${classes[t]} taken for ${classes[p]}: ${at.get(t * size + p) ?? 0} of ${totals[t]}`;
  });
  const wrong = counts.filter(([t, p]) => t !== p).sort((a, b) => b[2] - a[2]).slice(0, 20);
  return el("div", { class: "confusion" }, el("div", {}, canvas, readout), wrong.length ? table(
    ["true class", "taken for", "images"],
    wrong.map(([t, p, n]) => [classes[t], classes[p], `${n} of ${totals[t]}`])) : null);
}

function analysis(runs) {
  return ofEach("Features", runs, "analysis", ({ analysis: { encoders, pictures } }) => [
    table(["weights", "images", "effective rank of the embeddings", "dimensions"], encoders.map((found) =>
      [found.weights, number(found.images), number(found.effective_rank), number(found.dimensions)])),
    ...images(pictures),
  ]);
}

function exported(runs) {
  return ofEach("Exported weights", runs, "exported", (run) => run.exported.flatMap(({ folder, files, code }) => [
    el("p", {}, `${folder}: ${files.map(([name, bytes]) => `${name} (${size(bytes)})`).join(", ")}`),
    code ? el("pre", {}, code) : null,
  ]));
}

function options(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.options)))];
  const rows = names.map((name) => {
    const row = [name, ...runs.map((run) => words(run.options[name]))];
    row.differs = new Set(row.slice(1)).size > 1;
    return row;
  });
  const differing = rows.filter((row) => row.differs), head = ["option", ...runs.map((run) => run.name)];
  return [
    el("h2", {}, "Options"),
    differing.length ? table(head, differing) : null,
    details("all-options", `all ${rows.length} options`, table(head, rows)),
  ];
}

function statistics(runs) {
  return ofEach("What images are normalised by", runs, "images", ({ name, images: form, classes }) => [
    el("p", { class: "soft" }, `values of ${form.dtype}`),
    table(["channel", "mean", "deviation"], form.mean.map((mean, i) =>
      [words(form.channels?.[i] ?? i + 1), number(mean), number(form.std[i])])),
    classes ? details(`${name}-classes`, `${classes.length} classes`, el("p", {}, classes.join(", "))) : null,
  ]);
}

function unreadable(runs) {
  if (!runs.some((run) => run.unreadable.count)) return [];
  return [el("h2", {}, "Unreadable images"), ...runs.filter((run) => run.unreadable.count).map(({ name, unreadable: { count, named } }) =>
    details(`${name}-unreadable`, `${name}: ${count}${named.length < count ? `, of which the first ${named.length}` : ""}`,
      table(["image", "reason"], named)))];
}

function logs(runs) {
  return [el("h2", {}, "Log"), ...runs.map((run) =>
    details(`${run.name}-log`, `${run.name}: the last ${run.log.length} lines of train.log`, el("pre", { id: `${run.name}-lines` }, run.log.join("\n"))))];
}

// ---- the page

function section(id, shown, build, always = false) {
  const text = JSON.stringify(shown), active = document.activeElement;
  if (!always && drawn.get(id) === text) return;
  const busy = active?.matches("select, input[type=range]") && active.closest("section")?.id === id;
  if (!always && drawn.has(id) && busy) return; // it is drawn once nobody uses it any more
  drawn.set(id, text);
  const place = document.getElementById(id), focused = document.activeElement?.id;
  const scrolled = [...place.querySelectorAll("pre[id]")].map((pre) => [pre.id, pre.scrollTop]);
  place.replaceChildren(...build(record.runs).filter((part) => part !== null));
  for (const [of, top] of scrolled) document.getElementById(of)?.scrollTo(0, top);
  if (focused && document.activeElement?.id !== focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

function render() {
  const of = (...parts) => record.runs.map((run) => [run.name, ...parts.map((part) => run[part])]);
  section("facts", of("facts", "notes", "verdict"), facts);
  section("charts", of("charts"), charts);
  section("reconstructions", of("reconstructions"), reconstructions);
  section("evaluation", of("evaluation"), evaluation);
  section("analysis", of("analysis"), analysis);
  section("exported", of("exported"), exported);
  section("options", of("options"), options);
  section("images", of("images", "classes"), statistics);
  section("unreadable", of("unreadable"), unreadable);
  section("log", of("log"), logs);
}

const news = document.getElementById("news"), alarm = document.getElementById("alarm");
const made = () => { news.textContent = record.live ? `renewed at ${record.made}` : `as of ${record.made}`; };

async function renew() {
  try {
    const answer = await fetch("record.json");
    if (!answer.ok) throw new Error(await answer.text());
    record = await answer.json();
    alarm.textContent = "";
    made();
    render();
  } catch (error) {
    const reason = error instanceof TypeError ? "nobody serves it any more" : error.message;
    const text = `This page is as of ${record.made}: ${reason}.`;
    if (alarm.textContent !== text) alarm.textContent = text;
  }
  setTimeout(renew, 3000);
}

const theme = document.getElementById("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  document.documentElement.dataset.theme = view.theme === "system" ? (dark.matches ? "dark" : "light") : view.theme;
  theme.textContent = `theme: ${view.theme}`;
}
theme.addEventListener("click", () => {
  const order = ["system", "light", "dark"];
  view.theme = order[(order.indexOf(view.theme) + 1) % order.length];
  paint();
});
dark.addEventListener("change", paint);

paint();
made();
render();
if (record.live) setTimeout(renew, 3000);
