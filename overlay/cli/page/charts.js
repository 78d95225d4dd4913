// The series of the last five minutes as small line charts that share one crosshair and one time
// axis.

import { byId, count, el, keep, ms, rate, say, set, span } from "./dom.js";

const CHARTS = [
  { title: "answers, a second", lines: [["completed", "completed"]], format: rate },
  { title: "requests", lines: [["in_service", "in service"], ["waiting", "waiting"]], format: count },
  { title: "service time, ms", lines: [["p50_ms", "p50"], ["p99_ms", "p99"]], format: ms },
  { title: "not answered, a second", lines: [["refused", "refused"], ["cancelled", "cancelled"], ["failed", "failed"]], format: rate },
];
const LEAST = 30; // points on the axis; with fewer, its left is empty
const HEIGHT = 108, LEFT = 38, TOP = 8, BOTTOM = 18;

let hovered = null; // the point under the pointer, counted from the newest
let drawn = null;

export function drawCharts(series, interval, kept) {
  drawn = { series, interval, kept, shown: Math.min(kept, Math.max(LEAST, known(series))) };
  hovered = hovered === null ? null : Math.min(hovered, drawn.shown - 1);
  keep(byId("charts"), CHARTS, (chart) => chart.title, make, update);
  say(byId("series-when"), hovered === null ? `last ${axis()}` : `${span(hovered * interval)} ago`);
}

function make(chart) {
  const svg = el("svg", { "aria-hidden": "true" });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const part = (event.clientX - box.left - LEFT) / (box.width - LEFT);
    hovered = Math.round((1 - Math.min(1, Math.max(0, part))) * (drawn.shown - 1));
    again();
  });
  svg.addEventListener("pointerleave", () => { hovered = null; again(); });
  const keys = chart.lines.map((_, i) => el("span", { class: `key k${i}` }));
  return el("figure", { class: "chart" }, el("figcaption", {}, el("b", {}, chart.title), keys), svg);
}

// How many points back from now have figures.
function known(series) {
  const since = (points) => points.length - points.findIndex((v) => v !== null);
  const lines = CHARTS.flatMap((chart) => chart.lines).map(([name]) => series[name] ?? []);
  return Math.max(0, ...lines.filter((points) => points.some((v) => v !== null)).map(since));
}

const axis = () => span(drawn.shown * drawn.interval).replace(" min 0 s", " min");
const again = () => drawn && drawCharts(drawn.series, drawn.interval, drawn.kept);

function update(figure, chart) {
  const svg = figure.querySelector("svg");
  const width = svg.clientWidth || 300;
  const lines = chart.lines.map(([name]) => drawn.series[name] ?? []);
  const most = ceiling(Math.max(0, ...lines.flat().filter((v) => v !== null)));
  const x = (fromEnd) => LEFT + (width - LEFT) * (1 - fromEnd / (drawn.shown - 1));
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / most);

  figure.querySelectorAll(".key").forEach((key, i) => {
    const points = lines[i];
    const value = points[points.length - 1 - (hovered ?? 0)];
    say(key, `${chart.lines[i][1]} ${chart.format(value)}`);
  });
  const shapes = [];
  for (const part of [0, 0.5, 1]) {
    shapes.push(["line", `g${part}`, { class: "grid", x1: LEFT, x2: width, y1: Math.round(y(most * part)), y2: Math.round(y(most * part)) }]);
    shapes.push(["text", `t${part}`, { x: LEFT - 6, y: y(most * part) + 3.5, "text-anchor": "end" }, tick(most * part)]);
  }
  shapes.push(["text", "from", { x: LEFT, y: HEIGHT - 4 }, `−${axis()}`]);
  shapes.push(["text", "to", { x: width, y: HEIGHT - 4, "text-anchor": "end" }, "now"]);
  if (lines.length === 1) shapes.push(["path", "area", { class: "area", d: outline(lines[0], x, y, y(0)) }]);
  lines.forEach((points, i) => shapes.push(["path", `l${i}`, { class: `line k${i}`, d: outline(points, x, y) }]));
  if (hovered !== null) shapes.push(["line", "hair", { class: "hair", x1: x(hovered), x2: x(hovered), y1: TOP, y2: HEIGHT - BOTTOM }]);
  keep(svg, shapes, ([, key]) => key, ([tag]) => el(tag), (shape, [tag, , attributes, text]) => {
    set(shape, attributes);
    if (tag === "text") say(shape, text);
  });
}

// A path with gaps where nothing is known; with a floor, each piece is closed down to it.
export function outline(points, x, y, floor = null) {
  let path = "", open = false, last = 0;
  const close = () => (open && floor !== null ? `L${x(last).toFixed(1)} ${floor.toFixed(1)}Z` : "");
  points.forEach((value, i) => {
    const fromEnd = points.length - 1 - i;
    if (value === null) {
      path += close();
      open = false;
      return;
    }
    const here = `${x(fromEnd).toFixed(1)} ${y(value).toFixed(1)}`;
    if (open) path += `L${here}`;
    else path += floor === null ? `M${here}L${here}` : `M${x(fromEnd).toFixed(1)} ${floor.toFixed(1)}L${here}`;
    open = true;
    last = fromEnd;
  });
  return path + close();
}

// The next 1, 2 or 5 times a power of ten.
function ceiling(value) {
  if (value <= 1) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= value);
}

const tick = (value) => (value >= 1000 ? `${value / 1000}k` : String(value));

export function sparkline(svg, points, kept) {
  const most = Math.max(1, ...points.filter((v) => v !== null));
  const d = outline(points, (fromEnd) => 65 * (1 - fromEnd / (kept - 1)) + 0.5, (v) => 15 - 14 * (v / most));
  keep(svg, ["line"], (name) => name, () => el("path", { class: "line" }), (path) => set(path, { d }));
}
