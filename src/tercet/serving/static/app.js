// The page of `tercet app`. Texts are shown as text (textContent), never as HTML; nothing is loaded from elsewhere.
"use strict";
const $ = (id) => document.getElementById(id);
const COLORS = ["#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0"];
const REST = "#9aa0a6";
const state = { info: null, plots: [], labels: [], current: -1, over: -1, chosenRuns: [], runs: [], live: null };

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

async function ask(path, body, type = "json") {
  const key = sessionStorage.getItem("key");
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  if (body) headers["content-type"] = "application/json";
  const answer = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  if (answer.status === 401) {
    const given = prompt("This server asks for its key:");
    if (given) {
      sessionStorage.setItem("key", given);
      return ask(path, body, type);
    }
  }
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  return type === "json" ? answer.json() : answer.arrayBuffer();
}

// Images are asked for with the key, which the address of an <img> could not carry, and not before they come into sight.
const inSight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries)
    if (isIntersecting) {
      inSight.unobserve(target);
      load(target).catch(() => {}); // its alternative text is shown
    }
}, { rootMargin: "300px" });

async function load(picture) {
  const file = await ask(`/page/api/image/${picture.dataset.row}?started=${state.info.images}`, null, "binary");
  const address = URL.createObjectURL(new Blob([file], { type: "image/jpeg" }));
  picture.addEventListener("load", () => URL.revokeObjectURL(address), { once: true });
  picture.src = address;
}

// The image of a row; null for a text. The name stands beside it, so that the alternative text need not repeat it.
function thumb(found) {
  if (!state.info.images || !found) return null;
  const made = element("img", { class: "thumb", "data-row": found.row, alt: found.label ? `Image of ${found.label}` : "Image" });
  inSight.observe(made);
  return made;
}
const held = () => (state.info.images ? "images" : "texts");

const guarded = (work) => async (...given) => {
  try {
    problem("");
    await work(...given);
  } catch (error) {
    problem(error.message);
  }
};

// ---------------------------------------------------------------- views

const VIEWS = {
  map: { title: "Map", open: openMap },
  changes: { title: "What changed", open: openChanges },
  mistakes: { title: "Mistakes", open: openMistakes },
  runs: { title: "Runs", open: openRuns },
};

function views() {
  const { info } = state;
  return Object.keys(VIEWS).filter(
    (name) => (name === "runs" ? info.runs : info.count) && (name !== "changes" || info.models.length === 2),
  );
}

const show = guarded(async (name) => {
  for (const each of Object.keys(VIEWS)) $(each).hidden = each !== name;
  for (const button of $("tabs").children) button.setAttribute("aria-current", String(button.dataset.view === name));
  if (location.hash.slice(1) !== name) history.replaceState(null, "", `#${name}`);
  clearTimeout(state.live);
  await VIEWS[name].open();
});

// ---------------------------------------------------------------- map

let mapIsOpen = null;
function openMap() {
  mapIsOpen ??= makeMap();
  return mapIsOpen;
}

async function makeMap() {
  const { info } = state;
  $("color").append(
    element("option", { value: "" }, "by label"),
    ...info.labels.slice(0, 500).map((name, i) => element("option", { value: String(i) }, name || "without a label")),
  );
  $("color").addEventListener("change", guarded(() => Promise.all(state.plots.map(paint))));
  $("part").textContent = info.part ? `${info.count}${info.part}` : "";
  const boxes = info.names.map((name, i) => {
    const canvas = element("canvas", { tabindex: "0", role: "img", "aria-label": `Map of ${info.count} ${held()} by ${name}` });
    const zoom = element("div", { class: "zoom" });
    return { name, canvas, zoom, box: element("div", { class: "plot" }, element("h3", { title: info.models[i] }, name), canvas, zoom) };
  });
  $("plots").append(...boxes.map(({ box }) => box)); // all of them, so that each has its width before it is drawn
  for (const [i, { name, canvas, zoom }] of boxes.entries()) {
    const data = new Float32Array(await ask(`/page/api/points/${i}`, null, "binary"));
    const rows = data.length / 3;
    const column = (c) => Float32Array.from({ length: rows }, (_, row) => data[3 * row + c]);
    const plot = { canvas, x: column(0), y: column(1), label: column(2) };
    const { width, height } = canvas.getBoundingClientRect();
    plot.scatter = createScatterplot({
      canvas, width, height, pointSize: rows > 20000 ? 2 : rows > 2000 ? 4 : 6, pointColorActive: "#000", pointColorHover: "#000",
      opacityBy: null, opacity: rows > 20000 ? 0.5 : 0.8, colorBy: "valueA", pointColor: [...COLORS, REST],
      backgroundColor: "#ffffff", lassoInitiator: false, actionKeyMap: {},
    });
    for (const [text, title, act] of [["+", "Zoom in", () => zoomBy(plot, 1.5)], ["−", "Zoom out", () => zoomBy(plot, 1 / 1.5)], ["⤢", "Show all", () => plot.scatter.reset()]])
      zoom.append(element("button", { type: "button", title, "aria-label": `${title}: ${name}`, onclick: act }, text));
    plot.scatter.subscribe("pointOver", guarded((row) => tip(plot, row)));
    plot.scatter.subscribe("pointOut", () => { state.over = -1; $("tip").hidden = true; });
    plot.scatter.subscribe("select", guarded(({ points }) => points.length && points[0] !== state.current ? neighbors({ row: points[0] }) : null));
    canvas.addEventListener("keydown", guarded((event) => key(plot, event)));
    touch(plot);
    state.plots.push(plot);
    await paint(plot);
  }
  new ResizeObserver(() => {
    for (const { canvas, scatter } of state.plots) {
      const { width, height } = canvas.getBoundingClientRect();
      if (width && height) scatter.set({ width, height });
    }
  }).observe($("plots"));
  document.body.dataset.ready = "map";
}

async function paint(plot) {
  const wanted = $("color").value;
  const colored = wanted === "" ? (label) => Math.min(label, COLORS.length) : (label) => (label === Number(wanted) ? 0 : COLORS.length);
  const valueA = Array.from(plot.label, colored);
  const names = wanted === "" ? state.info.labels.slice(0, COLORS.length) : [state.info.labels[Number(wanted)]];
  const several = state.info.labels.length > 1;
  $("legend").replaceChildren(
    ...(several ? names : []).map((name, i) => element("li", {}, element("i", { style: `background:${COLORS[i]}` }), name || "without a label")),
    several && (wanted !== "" || state.info.labels.length > COLORS.length) ? element("li", {}, element("i", { style: `background:${REST}` }), "others") : "",
  );
  plot.scatter.set({ pointColor: [...COLORS, REST] });
  // Every color is named once, whatever the rows have: the numbers of colors are those of the palette.
  await plot.scatter.draw({ x: plot.x, y: plot.y, valueA }, { zDataType: "categorical" });
}

const texts = new Map();
async function item(row) {
  if (!texts.has(row)) texts.set(row, (await ask(`/page/api/items?rows=${row}`))[0]);
  return texts.get(row);
}

async function tip(plot, row) {
  state.over = row;
  const found = await item(row);
  if (state.over !== row) return; // the pointer has moved on
  const [x, y] = plot.scatter.getScreenPosition(row) ?? [0, 0];
  const place = plot.canvas.getBoundingClientRect();
  const box = $("tip");
  box.replaceChildren(thumb(found) ?? "", found.label ? `${found.text}  [${found.label}]` : found.text);
  box.hidden = false;
  box.style.left = `${Math.max(4, Math.min(place.left + x + 12, innerWidth - box.offsetWidth - 4))}px`;
  box.style.top = `${Math.max(4, Math.min(place.top + y + 12, innerHeight - box.offsetHeight - 4))}px`;
}

function moved(plot, change) {
  const matrix = Array.from(plot.scatter.get("cameraView"));
  change(matrix);
  plot.scatter.view(matrix);
}
const scaled = (matrix, factor, x = 0, y = 0) => {
  for (const i of [0, 1, 4, 5]) matrix[i] *= factor;
  matrix[12] = x + (matrix[12] - x) * factor;
  matrix[13] = y + (matrix[13] - y) * factor;
};
const zoomBy = (plot, factor) => moved(plot, (matrix) => scaled(matrix, factor));

async function key(plot, event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const steps = { ArrowLeft: [0.15, 0], ArrowRight: [-0.15, 0], ArrowUp: [0, -0.15], ArrowDown: [0, 0.15] };
  if (steps[event.key]) moved(plot, (matrix) => { matrix[12] += steps[event.key][0]; matrix[13] += steps[event.key][1]; });
  else if (event.key === "+" || event.key === "=") zoomBy(plot, 1.3);
  else if (event.key === "-") zoomBy(plot, 1 / 1.3);
  else if (event.key === "0") plot.scatter.reset();
  else if ("npNP".includes(event.key)) {
    const step = event.key.toLowerCase() === "n" ? 1 : -1;
    await neighbors({ row: (state.current + step + state.info.count) % state.info.count });
  } else return;
  event.preventDefault();
}

function touch(plot) {
  let last = null;
  const seen = (event) => {
    const place = plot.canvas.getBoundingClientRect();
    const at = [...event.touches].map((t) => [((t.clientX - place.left) / place.width) * 2 - 1, 1 - ((t.clientY - place.top) / place.height) * 2]);
    const ratio = place.width / place.height;
    for (const point of at) point[0] *= ratio;
    const mean = [0, 1].map((c) => at.reduce((sum, point) => sum + point[c], 0) / at.length);
    return { count: at.length, mean, spread: at.length === 2 ? Math.hypot(at[0][0] - at[1][0], at[0][1] - at[1][1]) : 1 };
  };
  plot.canvas.addEventListener("touchstart", (event) => { last = seen(event); }, { passive: true });
  plot.canvas.addEventListener("touchmove", (event) => {
    const now = seen(event);
    if (last && last.count === now.count)
      moved(plot, (matrix) => {
        matrix[12] += now.mean[0] - last.mean[0];
        matrix[13] += now.mean[1] - last.mean[1];
        scaled(matrix, now.spread / last.spread, ...now.mean);
      });
    last = now;
    event.preventDefault();
  }, { passive: false });
  plot.canvas.addEventListener("touchend", (event) => { last = event.touches.length ? seen(event) : null; }, { passive: true });
}

function hit(found, only) {
  const label = found.label ? element("span", { class: "tag" }, found.label) : null;
  const score = found.score === undefined ? null : element("small", {}, ` ${found.score.toFixed(3)}`);
  const open = guarded(async () => { await show("map"); await neighbors({ row: found.row }); $("chosen").scrollIntoView({ block: "nearest" }); });
  return element("li", { class: only ? "only" : false }, element("button", { type: "button", onclick: open }, thumb(found), found.text, label, score, only ? element("span", { class: "tag" }, only) : null));
}

async function neighbors(asked) {
  const answer = await ask("/page/api/neighbors", asked);
  state.current = answer.query ? answer.query.row : -1;
  const label = state.info.images && answer.query.label ? element("span", { class: "tag" }, answer.query.label) : "";
  $("chosen").replaceChildren(thumb(answer.query) ?? "", answer.query ? answer.query.text : asked.text, label);
  const words = ["gained", "lost"]; // by the first model, which is the newer one
  $("hits").replaceChildren(
    ...answer.hits.map((hits, i) =>
      element("div", {}, element("h3", { title: state.info.models[i] }, state.info.names[i]),
        element("ol", { class: "rows" }, ...hits.map((found) => hit(found, found.shared ? null : words[i]))))),
  );
  for (const [i, each] of state.plots.entries()) {
    const marked = [...(state.current >= 0 ? [state.current] : []), ...answer.hits[i].map((found) => found.row)];
    each.scatter.select(marked, { preventEvent: true });
  }
}

// ---------------------------------------------------------------- lists

async function openChanges() {
  $("changes-note").textContent = `Of a sample of 2,000 ${held()} at most, those whose ten nearest neighbors differ most between the two models.`;
  const found = await ask("/page/api/changed");
  $("changed").replaceChildren(...found.map((row) => hit(row, `${row.shared} of ${row.of} shared`)));
}

async function openMistakes() {
  const pairs = state.info.kind === "pairs";
  $("mistakes-note").textContent = pairs
    ? "Pairs whose second text is found latest by its first, of a sample of 2,000 at most: what should be found, and what is found instead."
    : `Of a sample of 2,000 ${held()} at most, those whose nearest neighbor has another label, the widest gap first.`;
  const found = await ask("/page/api/mistakes");
  $("wrong").replaceChildren(...found.map((rows, i) => element("div", {}, element("h3", {}, `${state.info.names[i]}: ${rows.length || "no"} mistakes shown`),
    element("ol", { class: "rows" }, ...rows.map((row) => {
      const list = element("ul", { class: "rows" }, hit(row.right, row.rank ? `right, at place ${row.rank}` : "right"), hit(row.wrong, "found instead"));
      list.lastChild.classList.add("lost");
      const made = hit(row.query, null);
      made.append(list);
      return made;
    })))));
}

// ---------------------------------------------------------------- runs

async function openRuns() {
  state.runs = await ask("/page/api/runs");
  listRuns();
  await drawCurves();
  state.live = setTimeout(() => { if (!$("runs").hidden && !document.hidden) guarded(openRuns)(); else if (!$("runs").hidden) state.live = setTimeout(guarded(openRuns), 3000); }, 3000);
}

function listRuns() {
  const words = $("runs-filter").value.toLowerCase();
  const rows = state.runs.filter((run) => `${run.id} ${run.name} ${run.state} ${run.command}`.toLowerCase().includes(words));
  const head = ["", "run", "state", "name", "seed", "started", "result", "command"].map((name) => element("th", { scope: "col" }, name));
  $("list").replaceChildren(element("caption", {}, `${rows.length} of ${state.runs.length} runs${rows.length > 500 ? "; 500 shown" : ""}`), element("tr", {}, ...head),
    ...rows.slice(0, 500).map((run) => element("tr", {},
      element("td", {}, element("input", { type: "checkbox", "aria-label": `Choose ${run.id}`, checked: state.chosenRuns.includes(run.id), onchange: guarded((event) => choose(run.id, event.target.checked)) })),
      element("td", { class: "long" }, run.id),
      element("td", { class: `state-${run.state}`, title: run.error }, run.state),
      element("td", {}, run.name), element("td", {}, run.seed ?? ""),
      element("td", {}, new Date(run.started * 1000).toISOString().slice(0, 16).replace("T", " ")),
      element("td", {}, run.result), element("td", { class: "long" }, run.command))));
}

async function choose(id, on) {
  state.chosenRuns = state.chosenRuns.filter((other) => other !== id);
  if (on) state.chosenRuns.push(id);
  $("compare").disabled = state.chosenRuns.length !== 2;
  $("differences").hidden = true;
  await drawCurves();
}

let chart = null;
async function drawCurves() {
  const running = state.runs.filter((run) => run.state === "running").map((run) => run.id);
  const shown = (state.chosenRuns.length ? state.chosenRuns : running.length ? running : state.runs.slice(0, 1).map((run) => run.id)).slice(0, COLORS.length);
  const curves = await Promise.all(shown.map((id) => ask(`/page/api/curves?run=${encodeURIComponent(id)}`)));
  const names = [...new Set(curves.flatMap((each) => Object.keys(each)))].sort();
  const before = $("metric").value;
  $("metric").replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  $("metric").value = names.includes(before) ? before : names.find((name) => name.includes("loss")) ?? names[0] ?? "";
  const wanted = $("metric").value;
  const maps = curves.map((each) => new Map(each[wanted] ?? []));
  const steps = [...new Set(maps.flatMap((map) => [...map.keys()]))].sort((a, b) => a - b);
  if (chart) chart.destroy();
  chart = null;
  $("curves").replaceChildren(steps.length ? "" : "No curves yet.");
  if (!steps.length) return;
  const series = shown.map((id, i) => ({ label: id.slice(-40), stroke: COLORS[i], width: 2, spanGaps: true, points: { show: steps.length < 60 } }));
  chart = new uPlot({ width: Math.max(280, $("curves").clientWidth), height: 260, scales: { x: { time: false } }, series: [{ label: "step" }, ...series] },
    [steps, ...maps.map((map) => steps.map((step) => map.get(step) ?? null))], $("curves"));
  $("curves").dataset.points = String(steps.length);
}

async function compareRuns() {
  const [first, second] = state.chosenRuns;
  const rows = await ask(`/page/api/differences?first=${encodeURIComponent(first)}&second=${encodeURIComponent(second)}`);
  const head = ["differs", first, second].map((name) => element("th", { scope: "col" }, name));
  $("differences").replaceChildren(element("tr", {}, ...head), ...rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", { class: "long" }, cell == null ? "" : String(cell))))));
  $("differences").hidden = false;
}

// ---------------------------------------------------------------- start

// The last part of each path, or as many more as make different models differ.
function shortened(models) {
  const last = (count) => models.map((name) => name.split("/").filter(Boolean).slice(-count).join("/"));
  const different = (names) => new Set(names).size;
  let count = 1;
  while (count < 20 && different(last(count)) < different(models)) count += 1;
  return last(count);
}

const start = guarded(async () => {
  state.info = await ask("/page/api/info");
  state.info.names = shortened(state.info.models);
  document.body.classList.toggle("with-images", Boolean(state.info.images));
  $("query").hidden = $("find").hidden = !state.info.search;
  const known = views();
  $("tabs").append(...known.map((name) => element("button", { type: "button", "data-view": name, onclick: () => show(name) }, VIEWS[name].title)));
  $("search").addEventListener("submit", (event) => { event.preventDefault(); if ($("query").value) guarded(neighbors)({ text: $("query").value }); });
  $("filter").addEventListener("submit", (event) => event.preventDefault());
  $("runs-filter").addEventListener("input", listRuns);
  $("metric").addEventListener("change", guarded(drawCurves));
  $("compare").addEventListener("click", guarded(compareRuns));
  addEventListener("hashchange", () => { if (known.includes(location.hash.slice(1))) show(location.hash.slice(1)); });
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !/INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName) && state.info.search && known.includes("map")) { event.preventDefault(); show("map"); $("query").focus(); }
    if (event.key === "Escape") $("tip").hidden = true;
  });
  const asked = location.hash.slice(1);
  await show(known.includes(asked) ? asked : known[0]);
});
start();
