"use strict";
// Small charts in SVG. Text goes in as text, never as markup.

const NS = "http://www.w3.org/2000/svg";

function el(tag, attributes, ...children) {
  const svg = ["svg", "g", "path", "line", "circle", "rect", "text", "title"].includes(tag);
  const made = svg ? document.createElementNS(NS, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) if (value != null) made.setAttribute(key, value);
  for (const child of children.flat(Infinity)) if (child != null) made.append(child);
  return made;
}

function digits(value) { return Math.abs(value) < 9.995 ? 2 : Math.abs(value) < 99.95 ? 1 : 0; }

function bytes(size) {
  if (size == null) return "–";
  let value = size;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (Math.abs(value) < 999.95) return unit === "B" ? `${value.toFixed(0)} B` : `${value.toFixed(digits(value))} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(2)} TB`;
}

function binary(size) {
  let value = size, unit = "B";
  for (unit of ["B", "KiB", "MiB", "GiB", "TiB"]) { if (value < 999.5 || unit === "TiB") break; value /= 1024; }
  return unit === "B" ? `${value} B` : `${value.toFixed(digits(value))} ${unit}`;
}

function seconds(time) {
  if (time == null) return "–";
  return time < 0.9995 ? `${(time * 1000).toFixed(digits(time * 1000))} ms` : `${time.toFixed(digits(time))} s`;
}

function percent(share, places = 0) { return `${(100 * share).toFixed(places)}%`; }

const tip = document.getElementById("tip");

function hover(node, text) {
  node.addEventListener("mousemove", (event) => showTip(event, text));
  node.addEventListener("mouseleave", hideTip);
}

function showTip(event, text) {
  tip.textContent = text;
  tip.style.opacity = 1;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 10);
  tip.style.left = `${left}px`;
  tip.style.top = `${Math.max(8, event.clientY - tip.offsetHeight - 12)}px`;
}

function hideTip() { tip.style.opacity = 0; }

// Values to pixels, on a log scale where asked.
function scale(low, high, from, to, log = false) {
  const f = log ? Math.log : (x) => x;
  const at = (x) => from + (f(x) - f(low)) / (f(high) - f(low) || 1) * (to - from);
  at.ticks = log ? logTicks(low, high) : ticks(low, high);
  return at;
}

function ticks(low, high, most = 6) {
  const raw = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((x) => x * power).find((x) => x >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(at);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10)
    for (const x of [1, 2, 5]) if (x * power >= low && x * power <= high) found.push(x * power);
  return found.length > 1 ? found : ticks(low, high);
}

function frame(width, height, label) {
  return el("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
}

function yAxis(svg, y, x0, x1, format) {
  for (const tick of y.ticks) {
    svg.append(el("line", { x1: x0, x2: x1, y1: y(tick), y2: y(tick), class: "grid" }));
    svg.append(el("text", { x: x0 - 8, y: y(tick) + 4, "text-anchor": "end" }, format(tick)));
  }
}

function xAxis(svg, x, y0, format) {
  for (const tick of x.ticks) svg.append(el("text", { x: x(tick), y: y0 + 18, "text-anchor": "middle" }, format(tick)));
}

function path(points, x, y) {
  return points.map(([at, size], i) => `${i ? "L" : "M"}${x(at).toFixed(1)},${y(size).toFixed(1)}`).join("");
}

// The curve's value at a share of the step.
function valueAt(points, at) {
  let best = points[0];
  for (const point of points) if (Math.abs(point[0] - at) < Math.abs(best[0] - at)) best = point;
  return best[1];
}

// Memory over a step. `curves` are {name, curve, colour, plain}; the first with an area below it is the plan's.
function memoryChart(curves, limit) {
  const width = 1060, height = 330, left = 66, right = width - 8, top = 14, bottom = height - 34;
  const svg = frame(width, height, "memory over the step");
  const most = Math.max(limit, ...curves.map((c) => c.curve.peak_bytes)) * 1.06;
  const x = scale(0, 1, left, right), y = scale(0, most, bottom, top);
  yAxis(svg, y, left, right, bytes);
  xAxis(svg, x, bottom, (share) => percent(share));
  for (const c of curves) {
    const drawn = path(c.curve.points, x, y), first = c.curve.points[0][0], last = c.curve.points.at(-1)[0];
    const area = `${drawn}L${x(last)},${bottom}L${x(first)},${bottom}Z`;
    svg.append(el("path", { d: area, class: c.plain ? "plain-area" : "area", style: c.plain ? null : `fill: ${c.colour}; opacity: .16` }));
    svg.append(el("path", { d: drawn, class: "line", style: `stroke: ${c.colour}` }));
    const peak = el("circle", { cx: x(c.curve.peak_at), cy: y(c.curve.peak_bytes), r: 4.5, class: "dot", style: `fill: ${c.colour}` });
    svg.append(peak);
    if (c.curve.backward_at < 0.95)
      svg.append(el("line", { x1: x(c.curve.backward_at), x2: x(c.curve.backward_at), y1: bottom, y2: bottom + 5, style: `stroke: ${c.colour}; stroke-width: 2` }));
  }
  svg.append(el("line", { x1: left, x2: right, y1: y(limit), y2: y(limit), class: "budget" }));
  svg.append(el("text", { x: left + 8, y: y(limit) - 6, class: "budget-text" }, `budget ${bytes(limit)}`));
  svg.append(el("text", { x: right, y: bottom + 32, "text-anchor": "end" }, "share of the step's calls"));
  const cursor = el("line", { y1: top, y2: bottom, class: "cursor", visibility: "hidden" });
  svg.append(cursor);
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = Math.min(1, Math.max(0, ((event.clientX - box.left) / box.width * width - left) / (right - left)));
    cursor.setAttribute("x1", x(at)); cursor.setAttribute("x2", x(at)); cursor.setAttribute("visibility", "visible");
    const lines = curves.map((c) => `${c.name}: ${bytes(valueAt(c.curve.points, at))}, ${at < c.curve.backward_at ? "forward" : "backward"}`);
    showTip(event, [`${percent(at)} of the step`, ...lines].join("\n"));
  });
  svg.addEventListener("mouseleave", () => { hideTip(); cursor.setAttribute("visibility", "hidden"); });
  return svg;
}

// Plans by peak and step time. `points` are trials with a `colour` and, where there are two studies, a `study`.
function scatterChart(points, fronts, limit, log) {
  const width = 1060, height = 380, left = 66, right = width - 20, top = 14, bottom = height - 34;
  const svg = frame(width, height, "memory and time of every plan measured");
  const size = (p) => p.peak_bytes ?? p.predicted_bytes;
  const peaks = [...points.map(size), limit], times = points.map((p) => p.step_seconds);
  const pad = (low, high) => log ? [low / (high / low) ** 0.05 / 1.02, high * (high / low) ** 0.05 * 1.02] : [Math.max(0, low - 0.06 * (high - low || low)), high + 0.06 * (high - low || high)];
  const x = scale(...pad(Math.min(...peaks), Math.max(...peaks)), left, right, log);
  const y = scale(...pad(Math.min(...times), Math.max(...times)), bottom, top, log);
  yAxis(svg, y, left, right, seconds);
  xAxis(svg, x, bottom, bytes);
  svg.append(el("line", { x1: x(limit), x2: x(limit), y1: top, y2: bottom, class: "budget" }));
  const leftOf = x(limit) > right - 130;
  svg.append(el("text", { x: x(limit) + (leftOf ? -6 : 6), y: top + 10, "text-anchor": leftOf ? "end" : "start", class: "budget-text" }, `budget ${bytes(limit)}`));
  for (const front of fronts) {
    const steps = front.points.flatMap((p, i) => i ? [[p.peak_bytes, front.points[i - 1].step_seconds], [p.peak_bytes, p.step_seconds]] : [[p.peak_bytes, p.step_seconds]]);
    if (steps.length > 1) svg.append(el("path", { d: path(steps, x, y), class: "front", style: `stroke: ${front.colour}` }));
  }
  for (const p of [...points].sort((a, b) => a.chosen - b.chosen)) {
    const at = { cx: x(size(p)), cy: y(p.step_seconds), style: p.status === "ok" ? `fill: ${p.colour}` : `fill: none; stroke: ${p.colour}` };
    const dot = el("circle", { ...at, r: p.chosen ? 8 : p.status === "ok" ? 5.5 : 4, class: `dot ${p.best || p.chosen || p.kind === "plain" ? "" : "behind"}` });
    const marks = [p.chosen ? "chosen" : "", p.status !== "ok" ? "one step only, memory as predicted" : p.fits ? "" : "over the budget"].filter(Boolean).join(", ");
    hover(dot, `${p.study ? `${p.study}: ` : ""}${p.plan}\n${bytes(size(p))}, ${seconds(p.step_seconds)} a step${marks ? `\n${marks}` : ""}`);
    svg.append(dot);
    if (p.chosen) svg.append(el("circle", { cx: at.cx, cy: at.cy, r: 12, fill: "none", style: `stroke: ${p.colour}; stroke-width: 1.6` }));
  }
  return svg;
}
