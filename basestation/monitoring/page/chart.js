// One chart: a title, the figures of the last minute, and a line for each of them over the last minutes.

import { element } from "./element.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 600;
const HEIGHT = 100;

export class Chart {
  // lines: [{ column, label }]; format makes a figure text; top is the highest figure that can occur, if there is one.
  constructor({ title, lines, format, top = null }) {
    this.title = title;
    this.lines = lines;
    this.format = format;
    this.top = top;
    this.values = element("p", "values");
    this.scale = element("span", "scale");
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.root = element("figure", "card chart", [
      element("figcaption", "", [title, this.scale]), this.values, this.svg,
    ]);
  }

  // lastMinute: figures by name. history: lists of figures by name, each as long as history.age. span: its seconds.
  update(lastMinute, history, span) {
    const shown = this.lines.map(({ column }) => history[column] ?? []);
    const highest = Math.max(0, ...shown.flat().filter((value) => value !== null));
    const top = this.top ?? roundUp(highest);
    this.scale.textContent = highest > 0 ? `to ${this.format(top)}` : "";
    this.values.replaceChildren(...this.lines.map((line, index) => this.figure(line, lastMinute, index)));
    this.svg.replaceChildren(...shown.flatMap((values, index) => paths(history.age, span, values, top, index)));
    const texts = shown.map((values, index) => this.summary(values, index));
    this.svg.setAttribute("aria-label", `${this.title}, history: ${texts.join("; ")}`);
  }

  figure({ column, label }, lastMinute, index) {
    const figure = element("strong", "", this.format(lastMinute[column] ?? null));
    return element("span", `line-${index}`, label ? [figure, ` ${label}`] : [figure]);
  }

  summary(values, index) {
    const known = values.filter((value) => value !== null);
    const label = this.lines[index].label ?? "";
    if (known.length === 0) return `${label} no figures`.trim();
    const [low, high] = [Math.min(...known), Math.max(...known)];
    return `${label} ${this.format(low)} to ${this.format(high)}`.trim();
  }
}

// A stroke for each run of neighbouring figures, and for the first line an area below it.
function paths(ages, span, values, top, index) {
  const x = (age) => (WIDTH * (1 - Math.min(age, span) / span)).toFixed(1);
  const y = (value) => (HEIGHT - (HEIGHT - 4) * (value / (top || 1))).toFixed(1);
  return runs(values).flatMap(([start, end]) => {
    const points = [];
    for (let at = start; at < end; at += 1) points.push(`${x(ages[at])},${y(values[at])}`);
    if (points.length === 1) points.push(`${Number(points[0].split(",")[0]) + 3},${y(values[start])}`);
    const stroke = path(`M${points.join("L")}`, `stroke-${index}`);
    if (index > 0) return [stroke];
    const [left, right] = [points[0], points.at(-1)].map((point) => point.split(",")[0]);
    return [path(`M${left},${HEIGHT}L${points.join("L")}L${right},${HEIGHT}Z`, "area"), stroke];
  });
}

// [start, end) of each run of figures without a null between them.
function runs(values) {
  const found = [];
  values.forEach((value, at) => {
    if (value === null) return;
    if (at > 0 && values[at - 1] !== null) found.at(-1)[1] = at + 1;
    else found.push([at, at + 1]);
  });
  return found;
}

function path(data, className) {
  const drawn = document.createElementNS(SVG, "path");
  drawn.setAttribute("d", data);
  drawn.setAttribute("class", className);
  return drawn;
}

// The next of 1, 2, 5, 10, 20, 50 …
function roundUp(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}
