"use strict";
// The page, from the JSON that `rowtune report --json` prints.

const report = JSON.parse(document.getElementById("report").textContent);
const root = document.getElementById("page");
const COLOURS = { rows: "var(--rows)", checkpoint: "var(--checkpoint)", keep: "var(--keep)", plain: "var(--plain)" };
const GOALS = { memory: "less memory", time: "less time", size: "larger inputs" };
const pages = report.compare ? [report, report.compare.other] : [report];

function section(title, hint, ...content) {
  return el("section", {}, el("h2", {}, title), el("p", { class: "hint" }, hint), content);
}

function table(columns, rows) {
  const head = el("tr", {}, columns.map(([name, kind]) => el("th", { class: kind || "" }, name)));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, rows)));
}

function cells(columns, values) {
  return el("tr", {}, values.map((value, i) => el("td", { class: columns[i][1] || "" }, value)));
}

function chip(colour) { return el("span", { class: "chip", style: `background: ${colour}` }); }

function legend(items) {
  return el("div", { class: "legend" }, items.map(([colour, text]) => el("span", {}, chip(colour), text)));
}

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const set = (name) => { document.documentElement.dataset.theme = name; };
  set(location.hash === "#dark" ? "dark" : location.hash === "#light" ? "light" : dark ? "dark" : "light");
  const button = el("button", { type: "button" }, "light / dark");
  button.addEventListener("click", () => set(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  return button;
}

function heading() {
  const [lead, ...rest] = report.verdict.text.split(": ");
  const title = el("h1", {}, el("span", { class: `lead ${report.verdict.fits ? "good" : "bad"}` }, `${lead[0].toUpperCase()}${lead.slice(1)}: `), rest.join(": ").split("; ")[0]);
  const more = report.verdict.text.split("; ").slice(1).join("; ");
  if (more) title.append(el("span", { class: "rest" }, `; ${more}`));
  const inputs = report.inputs.join(", ");
  return [el("header", {}, el("b", {}, report.model), el("span", {}, inputs), el("span", { class: "spring" }), el("span", {}, report.plan), theme()), title];
}

function tile(name, value, more, gauge) {
  return el("div", { class: "tile" }, el("div", { class: "name" }, name), el("div", { class: "value" }, value),
    gauge == null ? null : el("div", { class: "gauge" }, el("i", { class: gauge > 1 ? "over" : "", style: `width: ${Math.min(100, 100 * gauge)}%` })),
    el("div", { class: "more" }, more));
}

function tiles() {
  const v = report.verdict, c = report.certificate;
  const share = v.plain_peak_bytes ? v.peak_bytes / v.plain_peak_bytes : null;
  return el("div", { class: "tiles" },
    tile("Peak", bytes(v.peak_bytes), `of ${bytes(v.budget_bytes)} (${binary(v.budget_bytes)})`, v.peak_bytes / v.budget_bytes),
    tile("Of plain's memory", share == null ? "–" : percent(share), v.plain_peak_bytes ? `plain takes ${bytes(v.plain_peak_bytes)}` : "plain could not run here", share),
    tile("A step", seconds(v.step_seconds), v.times_plain ? `${v.times_plain.toFixed(2)}x plain's ${seconds(v.plain_step_seconds)}` : "plain could not be timed"),
    tile("Gradients", c.gradient_error == null ? "not compared" : c.gradient_error.toExponential(1), "largest difference from plain PyTorch's"));
}

function comparison() {
  if (!report.compare) return null;
  const rows = report.compare.rows.map((r) => el("tr", {}, el("td", {}, r.name),
    el("td", { class: r.better === "one" ? "win" : "" }, r.one), el("td", { class: r.better === "other" ? "win" : "" }, r.other)));
  return section("Side by side", report.compare.note || "the better of both in green", table([[""], [pages[0].plan], [pages[1].plan]], rows));
}

function how(s) {
  const words = s.halo ? [s.halo] : [];
  if (s.tapes && s.tapes !== "split") words.push(`tapes ${s.tapes}`);
  if (s.barriers && s.barriers !== "store") words.push(`barriers ${s.barriers}`);
  if (s.images) words.push(`${s.images} images`);
  if (s.cheap === "recompute") words.push("cheap recomputed");
  if (s.store !== "device") words.push(s.store === "host" ? "kept on the host" : `in ${s.store}`);
  return words.join(", ");
}

function strip(page) {
  const outer = page.segments.filter((s) => !s.depth), total = outer.reduce((sum, s) => sum + (s.seconds || 0), 0);
  const known = outer.some((s) => s.seconds != null);
  const columns = [["from"], ["to"], ["policy", "chips"], ["band", "n"], ["how"], ...(known ? [["keeps", "n"], ["at most", "n"], ["time", "n"]] : [])];
  const blocks = new Map();
  const bar = el("div", { class: "strip" }, outer.map((s) => {
    const wide = (s.share == null ? 1 / outer.length : s.share) > 0.07;
    const block = el("div", { class: s.policy, style: `flex: ${Math.max(s.share == null ? 1 / outer.length : s.share, 0.004)} 1 0` },
      wide ? el("span", {}, s.band_rows ? `${s.policy} ${s.band_rows}` : s.policy) : null, wide && s.kept_bytes != null ? el("small", {}, `keeps ${bytes(s.kept_bytes)}`) : null);
    hover(block, `${s.first} to ${s.last}\n${s.policy}${s.band_rows ? `, bands of ${s.band_rows} rows` : ""} ${how(s)}${s.seconds == null ? "" : `\nkeeps ${bytes(s.kept_bytes)}, at most ${bytes(s.peak_bytes)} alive, ~${seconds(s.seconds)}`}`);
    blocks.set(s, block);
    return block;
  }));
  const rows = page.segments.map((s) => {
    const name = el("span", { style: `padding-left: ${s.depth * 16}px` }, s.first);
    const time = s.seconds == null ? "" : `~${seconds(s.seconds)}  ${percent(s.seconds / (total || 1))}`;
    const row = cells(columns, [name, s.last, el("span", {}, chip(COLOURS[s.policy]), s.policy), s.band_rows || "", how(s), ...(known ? [s.kept_bytes == null ? "" : bytes(s.kept_bytes), s.peak_bytes == null ? "" : bytes(s.peak_bytes), time] : [])]);
    const block = blocks.get(s);
    for (const [from, to] of block ? [[row, block], [block, row]] : []) {
      from.addEventListener("mouseenter", () => to.classList.add("on"));
      from.addEventListener("mouseleave", () => to.classList.remove("on"));
    }
    return row;
  });
  const ends = el("div", { class: "ends" }, el("span", {}, "input"), el("span", {}, "width: share of the feature maps"), el("span", {}, "loss"));
  return section(pages.length > 1 ? `The plan along the network: ${page.plan}` : "The plan along the network", page.words, bar, ends, table(columns, rows));
}

function held(curve, name, colour) {
  const most = Math.max(...curve.held.map((h) => h.bytes), 1);
  const items = curve.held.map((h) => el("li", {}, el("span", { class: "track" }, el("i", { class: "bar", style: `width: ${Math.max(2, 84 * h.bytes / most)}px; background: ${colour}` })),
    el("span", { class: "what" }, h.name, h.count > 1 && h.role === "activation" ? ` ×${h.count}` : ""), el("span", { class: "size" }, bytes(h.bytes))));
  return el("div", {}, el("h3", {}, `At the peak of ${name}: ${bytes(curve.peak_bytes)}, ${curve.where}`), el("ul", {}, items));
}

function memory() {
  const known = pages.filter((p) => p.memory);
  if (!known.length) return section("Memory over the step", report.note);
  const curves = [{ name: "plain PyTorch", curve: known[0].memory.plain, colour: "var(--plain)", plain: true },
    ...known.map((p, i) => ({ name: pages.length > 1 ? p.plan : "the plan", curve: p.memory.plan, colour: i ? "var(--other)" : "var(--rows)" }))];
  const hint = "bytes alive call by call, forward then backward; the dot is the peak, the tick where backward begins";
  const calls = curves.map((c) => [c.colour, `${c.name}, ${c.curve.calls} calls${c.curve.detail === "segments" ? ", drawn by segments" : ""}`]);
  const lists = [...curves.slice(1), curves[0]].map((c) => held(c.curve, c.name, c.colour));
  return section("Memory over the step", hint, memoryChart(curves, report.verdict.limit_bytes), legend(calls), el("div", { class: "held" }, lists));
}

function scatter() {
  const studies = pages.map((page, i) => page.trials.filter((t) => t.step_seconds && (t.status === "ok" ? t.peak_bytes : t.status === "slow" && t.predicted_bytes)).map((t) => ({
    ...t, study: pages.length > 1 ? page.plan : "", colour: t.kind === "plain" ? COLOURS.plain : pages.length > 1 ? (i ? "var(--other)" : "var(--rows)") : t.chosen ? "var(--good)" : COLOURS[t.kind] })));
  const points = studies.flat();
  if (!points.length) return null;
  const fronts = studies.map((study, i) => ({ colour: i ? "var(--other)" : "var(--rows)", points: study.filter((p) => p.best).sort((a, b) => a.peak_bytes - b.peak_bytes) }));
  const place = el("div", {}), button = el("button", { type: "button" }, "log scale");
  const spread = (key) => { const all = points.map((p) => p[key]).filter(Boolean); return Math.max(...all) / Math.min(...all); };
  let log = spread("peak_bytes") > 5 || spread("step_seconds") > 5;
  const draw = () => { button.setAttribute("aria-pressed", log); place.replaceChildren(scatterChart(points, fronts, report.verdict.limit_bytes, log)); };
  button.addEventListener("click", () => { log = !log; draw(); });
  draw();
  const items = pages.length > 1 ? [["var(--rows)", pages[0].plan], ["var(--other)", pages[1].plan], ["var(--plain)", "plain PyTorch"]]
    : [["var(--good)", "chosen"], ...Object.entries(COLOURS).filter(([kind]) => points.some((p) => p.kind === kind && !p.chosen)).map(([kind, colour]) => [colour, kind === "plain" ? "plain PyTorch" : kind])];
  const foot = el("div", { style: "display: flex; justify-content: space-between; align-items: end" }, legend(items), button);
  return section("Memory and time of every plan measured", "right: more memory; up: slower; the line is the front: nothing is both smaller and faster; hollow: left after one step", place, foot);
}

function knobs() {
  const shown = report.knobs.filter((k) => k.matters > 0);
  if (!shown.length) return null;
  const columns = [["knob"], [""], ["", "n"], ["fastest that fits, by value"]];
  const rows = shown.map((k) => cells(columns, [k.name, el("i", { class: "bar", style: `width: ${90 * k.matters}px` }), percent(k.matters),
    k.choices.filter((c) => c.measured).map((c) => `${c.value} ${c.best_seconds ? seconds(c.best_seconds) : "none"}`).join(", ")]));
  return section("Knobs that mattered", "share of the spread of step times that goes with a knob's value", table(columns, rows));
}

function savings() {
  const shown = report.savings || [];
  if (!shown.length) return null;
  const columns = [["saver"], [""], ["", "n"]], most = Math.max(...shown.map((s) => s.bytes), 1);
  const rows = shown.map((s) => cells(columns, [s.name, el("i", { class: "bar", style: `width: ${Math.max(0, 90 * s.bytes / most)}px` }), s.bytes > 0 ? bytes(s.bytes) : "nothing"]));
  const host = report.host_bytes ? `; ${bytes(report.host_bytes)} wait on the host` : "";
  return section("What each saver takes off the peak", `the same plan without it, as predicted, the others in place${host}`, table(columns, rows));
}

function failures() {
  if (!report.failures.length) return null;
  const columns = [["", "n"], [""], ["why"], ["for example"]];
  const rows = report.failures.map((f) => cells(columns, [String(f.count), f.status, f.reason, f.example]));
  return section("What was not measured, and why", "plans that were left, rejected or failed", table(columns, rows));
}

function command(text) {
  const button = el("button", { type: "button" }, "copy");
  button.addEventListener("click", () => navigator.clipboard && navigator.clipboard.writeText(text).then(() => { button.textContent = "copied"; }));
  return el("div", { class: "command" }, el("code", {}, text), button);
}

function advice() {
  if (!report.advice.length) return null;
  return section("What to try", "from what was measured", report.advice.map((a) =>
    el("div", { class: "advice" }, el("span", { class: "goal" }, GOALS[a.goal]), a.text, a.command ? command(a.command) : null)));
}

function certificate() {
  const c = report.certificate, facts = [];
  const off = c.predicted_peak_bytes ? `, ${bytes(c.predicted_peak_bytes)} predicted` : "";
  facts.push(["peak", c.peak_bytes ? `${bytes(c.peak_bytes)} measured, ${bytes(c.limit_bytes)} allowed${off}` : "not measured"]);
  facts.push(["gradients", c.gradient_error == null ? "not compared with plain PyTorch's" : `equal to plain PyTorch's within ${c.gradient_error.toExponential(1)}${c.allowed_error ? ` (${c.allowed_error} allowed)` : ""}`]);
  if (c.over_bound != null) facts.push(["time", `${seconds(c.step_seconds)}, ${c.over_bound < 0 ? "" : "+"}${percent(c.over_bound)} from the fastest that the planner predicts within the budget (${seconds(c.bound_seconds)})`]);
  facts.push(["evidence", `${c.measured_plans} plans measured as real training steps`]);
  c.unexplored.forEach((text, i) => facts.push([i ? "" : "unexplored", text]));
  return section("Certificate", "what is known of the chosen plan, and what is not", el("dl", {}, facts.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)])));
}

function trials() {
  const columns = [["plan"], ["status"], ["peak", "n"], ["predicted", "n"], ["step", "n"], ["predicted", "n"]];
  const keys = ["plan", "status", "peak_bytes", "predicted_bytes", "step_seconds", "predicted_seconds"];
  const rows = [...report.trials].sort((a, b) => (b.fits - a.fits) || ((a.step_seconds ?? 1e9) - (b.step_seconds ?? 1e9)));
  const body = () => rows.map((t) => {
    const name = el("span", {}, chip(t.chosen ? "var(--good)" : COLOURS[t.kind]), t.plan, t.chosen ? " (chosen)" : "");
    return cells(columns, [name, t.status === "ok" && !t.fits ? "over budget" : t.status, bytes(t.peak_bytes), bytes(t.predicted_bytes), seconds(t.step_seconds), seconds(t.predicted_seconds)]);
  });
  const made = table(columns, body()), list = made.querySelector("tbody");
  made.querySelectorAll("th").forEach((head, i) => {
    head.classList.add("sortable");
    head.addEventListener("click", () => {
      rows.sort((a, b) => typeof a[keys[i]] === "string" ? a[keys[i]].localeCompare(b[keys[i]]) : (a[keys[i]] ?? 1e18) - (b[keys[i]] ?? 1e18));
      list.replaceChildren(...body());
    });
  });
  return section(`All ${rows.length} plans tried`, "a click on a column sorts", made);
}

function footer() {
  const v = report.versions;
  return el("footer", {}, `rowtune ${v.rowtune || ""}, torch ${v.torch || ""}, ${report.training}${report.note ? `; ${report.note}` : ""}`);
}

const two = (...parts) => { const found = parts.filter(Boolean); return found.length > 1 ? el("div", { class: "two" }, found) : found[0]; };
root.append(...[...heading(), tiles(), comparison(), ...pages.map(strip), memory(), savings(), scatter(), two(knobs(), failures()), advice(), certificate(), trials(), footer()].filter(Boolean));
document.body.dataset.ready = "yes";
