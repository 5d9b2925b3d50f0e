"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { layer: data.start[0], head: data.start[1], image: 0, patch: Math.floor(data.rows / 2) * data.cols + Math.floor(data.cols / 2), k: data.k };
const palette = ["#4263eb", "#f08c00", "#2b8a3e", "#c2255c", "#0c8599", "#9c36b5", "#a61e4d", "#5c940d", "#495057", "#e8590c"];

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}
function floats(text) {
  return new Float32Array(bytes(text).buffer);
}
// Maps are bytes, each relative to its own maximum.
function maps(packed) {
  return { values: bytes(packed.values), scale: floats(packed.scale) };
}
const meanMaps = maps(data.mean_maps);
const exampleMaps = maps(data.example_maps);
const classMaps = maps(data.class_maps);
const offsetMaps = floats(data.offset_maps);
const changes = Object.fromEntries(data.metrics.map((name) => [name, floats(data.changes[name])]));

const index = () => state.layer * data.heads + state.head;
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const number = (value) => (Number.isInteger(value) ? String(value) : Math.abs(value) < 1e-3 || Math.abs(value) >= 1e4 ? value.toExponential(1) : value.toPrecision(3));
const escaped = (text) => String(text).replace(/[&<>"]/g, (letter) => `&#${letter.charCodeAt(0)};`);

const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function rgb(value) {
  const at = clamp(value || 0, 0, 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  return stops[low].map((part, i) => Math.round(part + (stops[low + 1][i] - part) * (at - low)));
}
const colour = (value) => `rgb(${rgb(value).join(",")})`;
const ink = (value) => (value > 0.6 ? "#000" : "#fff");

function select(layer, head) {
  state.layer = clamp(layer, 0, data.layers - 1);
  state.head = clamp(head, 0, data.heads - 1);
  draw();
}
function options(element, values) {
  element.innerHTML = values.map(([value, text]) => `<option value="${value}">${text}</option>`).join("");
  element.addEventListener("change", draw);
}
function headGrid(element, content) {
  element.style.gridTemplateColumns = `2.4em repeat(${data.heads}, minmax(0, 1fr))`;
  let html = "";
  for (let layer = 0; layer < data.layers; layer++) {
    html += `<span class="name">L${layer}</span>`;
    for (let head = 0; head < data.heads; head++) {
      html += `<button data-layer="${layer}" data-head="${head}" tabindex="-1" title="Layer ${layer}, head ${head}">${content(layer, head)}</button>`;
    }
  }
  element.innerHTML = html;
  element.addEventListener("click", (event) => {
    const cell = event.target.closest("button");
    if (cell) select(+cell.dataset.layer, +cell.dataset.head);
  });
  element.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    select(state.layer + move[0], state.head + move[1]);
    element.querySelectorAll("button")[index()].focus();
  });
}
function pressed(element) {
  element.querySelectorAll("button").forEach((cell, i) => {
    cell.setAttribute("aria-pressed", i === index());
    cell.tabIndex = i === index() ? 0 : -1;
  });
}

// Axes of a chart: scaled positions, and the frame with its labels.
function chart(xs, ys, { width = 420, height = 140, left = 46, bottom = 28, xlabel = "", ticks = null } = {}) {
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (y0 === y1) [y0, y1] = [y0 - 0.5, y1 + 0.5];
  const x = (value) => left + ((value - x0) / (x1 - x0 || 1)) * (width - left - 12);
  const y = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - bottom - 8);
  const marks = (ticks || [x0, x1]).map((value) => `<text x="${x(value)}" y="${height - 16}" text-anchor="middle">${number(value)}</text>`);
  const frame =
    `<line x1="${left}" x2="${width - 12}" y1="${y(y0)}" y2="${y(y0)}" stroke="#adb5bd"/>` +
    `<text x="${left - 4}" y="${y(y0)}" text-anchor="end">${number(y0)}</text><text x="${left - 4}" y="${y(y1) + 8}" text-anchor="end">${number(y1)}</text>` +
    marks.join("") + `<text x="${(width + left) / 2}" y="${height - 4}" text-anchor="middle">${xlabel}</text>`;
  return { x, y, svg: (body, name = "") => `<svg viewBox="0 0 ${width} ${height}" class="${name}" role="img">${frame}${body}</svg>` };
}
const path = (points) => "M" + points.map((point) => point.map((value) => value.toFixed(1)).join(",")).join("L");
const quantile = (sorted, q) => {
  const at = q * (sorted.length - 1), low = Math.floor(at);
  return sorted[low] + (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]) * (at - low);
};

function drawImages() {
  const values = changes[$("metric").value];
  const shown = data.images.length;
  const own = data.images.map((_, i) => Math.abs(values[index() * shown + i]));
  const most = Math.max(...own, 1e-12);
  $("images").querySelectorAll("button").forEach((cell, i) => {
    cell.style.borderColor = colour(own[i] / most);
    cell.setAttribute("aria-pressed", i === state.image);
  });
  const facts = data.facts[state.image];
  $("image-facts").textContent = `Image ${state.image}${facts ? ": " + facts : ""}. ${$("metric").value} without the head: ${number(values[index() * shown + state.image])}.`;
}
function drawImportance() {
  const values = data.importance[$("pruning").value][$("metric").value];
  const low = Math.min(...values, 0), high = Math.max(...values, low + 1e-12);
  $("importance").querySelectorAll("button").forEach((cell, i) => {
    const share = (values[i] - low) / (high - low);
    cell.style.background = colour(share);
    cell.style.color = ink(share);
    cell.textContent = data.heads <= 12 ? number(values[i]) : "";
    cell.setAttribute("aria-label", `Layer ${cell.dataset.layer}, head ${cell.dataset.head}: ${number(values[i])}`);
  });
  pressed($("importance"));
  $("importance-scale").textContent = `${number(low)} (dark) to ${number(high)} (bright), mean over ${data.num_images} images.`;
}
function drawPartial() {
  const parts = data.partial[`${state.layer}-${state.head}`];
  if (!parts) {
    const heads = Object.keys(data.partial).map((name) => name.replace("-", "."));
    $("partial").innerHTML = `<p>${heads.length ? "The most important heads were taken apart: " + heads.join(", ") + "." : "No heads were taken apart."}</p>`;
    return;
  }
  const rows = Object.entries(parts).map(([name, values]) => [name, values[$("metric").value]]);
  const most = Math.max(...rows.map((row) => Math.abs(row[1])), 1e-12);
  const bars = rows.map(([name, value], i) => `<text x="96" y="${i * 16 + 12}" text-anchor="end">${name}</text>` +
    `<rect x="100" y="${i * 16 + 3}" height="11" width="${(Math.abs(value) / most) * 240}" fill="${value < 0 ? "#868e96" : "#4263eb"}"/>` +
    `<text x="${104 + (Math.abs(value) / most) * 240}" y="${i * 16 + 12}">${number(value)}</text>`);
  $("partial").innerHTML = `<svg viewBox="0 0 420 ${rows.length * 16}" role="img">${bars.join("")}</svg>`;
}
function drawCurve() {
  if (!data.curves.length) {
    $("curve").innerHTML = "<p>Not measured.</p>";
    return;
  }
  const axes = chart(data.curves.map((row) => row.removed), [0, 1], { xlabel: `heads removed; ${data.curves[0].score}` });
  const orders = [...new Set(data.curves.map((row) => row.order))];
  const lines = orders.map((order, i) => {
    const rows = data.curves.filter((row) => row.order === order);
    const band = rows.map((row) => [axes.x(row.removed), axes.y(clamp(row.mean + row.std, 0, 1))])
      .concat(rows.slice().reverse().map((row) => [axes.x(row.removed), axes.y(clamp(row.mean - row.std, 0, 1))]));
    return `<path d="${path(band)}Z" fill="${palette[i]}" opacity=".15"/>` +
      `<path d="${path(rows.map((row) => [axes.x(row.removed), axes.y(row.mean)]))}" fill="none" stroke="${palette[i]}" stroke-width="2"/>`;
  });
  const names = orders.map((order, i) => `<span><i style="background:${palette[i]}"></i>${order}</span>`);
  $("curve").innerHTML = `<div class="legend">${names.join("")}</div>${axes.svg(lines.join(""))}`;
}
function sparkline(layer, head) {
  const values = data.ring_mean[layer * data.heads + head];
  const most = Math.max(...values);
  const points = values.map((value, hop) => [2 + (hop / Math.max(1, values.length - 1)) * 56, 24 - (value / most) * 22]);
  return `<svg viewBox="0 0 60 26" preserveAspectRatio="none" aria-hidden="true"><path d="${path(points)}" fill="none" stroke="#495057" stroke-width="1.5"/></svg>`;
}
function drawProfile() {
  pressed($("profiles"));
  const own = data.ring_mean[index()], [low, high] = data.ring_bands[index()];
  const hops = own.map((_, hop) => hop);
  const boxes = hops.map((hop) => data.ring_mean.map((values) => values[hop]).sort((a, b) => a - b));
  const top = Math.max(...own, ...high, ...boxes.map((box) => quantile(box, 0.95)));
  const axes = chart(hops, [0, top], { xlabel: "hop", ticks: hops });
  const drawn = boxes.map((box, hop) => {
    const [q05, q25, q50, q75, q95] = [0.05, 0.25, 0.5, 0.75, 0.95].map((q) => axes.y(quantile(box, q)));
    const x = axes.x(hop);
    return `<line x1="${x}" x2="${x}" y1="${q05}" y2="${q95}" stroke="#ced4da"/><rect x="${x - 5}" width="10" y="${q75}" height="${q25 - q75}" fill="#e9ecef" stroke="#ced4da"/>` +
      `<line x1="${x - 5}" x2="${x + 5}" y1="${q50}" y2="${q50}" stroke="#868e96"/>`;
  });
  const band = high.map((value, hop) => [axes.x(hop), axes.y(value)]).concat(low.map((value, hop) => [axes.x(hop), axes.y(value)]).reverse());
  const uniform = axes.y(1 / data.tokens);
  $("profile").innerHTML = axes.svg(drawn.join("") +
    `<line x1="${axes.x(0)}" x2="${axes.x(hops.length - 1)}" y1="${uniform}" y2="${uniform}" stroke="#495057" stroke-dasharray="4 3"/>` +
    `<path d="${path(band)}Z" fill="#d6336c" opacity=".18"/><path d="${path(own.map((value, hop) => [axes.x(hop), axes.y(value)]))}" fill="none" stroke="#d6336c" stroke-width="2"/>`);
}
function drawTrend() {
  const values = data.strength[$("quantity").value];
  const layers = [...Array(data.layers).keys()];
  const axes = chart(layers, values, { xlabel: "layer", ticks: layers });
  const of = (layer) => values.slice(layer * data.heads, (layer + 1) * data.heads).sort((a, b) => a - b);
  const line = (q) => layers.map((layer) => [axes.x(layer), axes.y(quantile(of(layer), q))]);
  const dots = values.map((value, i) => `<circle cx="${axes.x(Math.floor(i / data.heads))}" cy="${axes.y(value)}" r="${i === index() ? 5 : 2.5}" fill="${i === index() ? "#d6336c" : "#868e96"}"/>`);
  $("trend").innerHTML = axes.svg(`<path d="${path(line(0.25).concat(line(0.75).reverse()))}Z" fill="#4263eb" opacity=".15"/>` +
    `<path d="${path(line(0.5))}" fill="none" stroke="#4263eb" stroke-width="2"/>` + dots.join(""));
}
function drawScatter() {
  const features = data.clusters[$("features").value];
  if (!features) {
    $("scatter").innerHTML = "<p>Too few heads for clusters.</p>";
    return;
  }
  const known = Object.keys(features.k).map(Number);
  state.k = clamp(state.k || known[0], Math.min(...known), Math.max(...known));
  $("clusters").value = state.k;
  const { labels, names } = features.k[state.k];
  const axes = chart(features.positions.map((point) => point[0]), features.positions.map((point) => point[1]), { height: 220, xlabel: "principal components of the features" });
  const order = labels.map((_, i) => i).sort((a, b) => (a === index()) - (b === index()));
  const dots = order.map((i) => `<circle data-index="${i}" cx="${axes.x(features.positions[i][0])}" cy="${axes.y(features.positions[i][1])}" r="${i === index() ? 8 : 5}" ` +
    `fill="${palette[labels[i] % palette.length]}" stroke="${i === index() ? "#000" : "#fff"}"><title>Layer ${Math.floor(i / data.heads)}, head ${i % data.heads}: ${names[labels[i]]}</title></circle>`);
  $("scatter").innerHTML = axes.svg(dots.join(""), "scatter");
  $("legend").innerHTML = names.map((name, i) => `<span><i style="background:${palette[i % palette.length]}"></i>${name} (${labels.filter((label) => label === i).length})</span>`).join("");
  const best = known.reduce((a, b) => (features.silhouette[a] >= features.silhouette[b] ? a : b));
  $("silhouette").textContent = `silhouette ${number(features.silhouette[state.k])}; largest at ${best}`;
}
// Draw values on a canvas; over an image where there is one.
function heat(canvas, rows, cols, values, image = null, marked = null) {
  const context = canvas.getContext("2d");
  const size = image ? 16 : 1;
  canvas.width = cols * size;
  canvas.height = rows * size;
  if (image && image.complete) context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const most = Math.max(...values, 1e-12);
  values.forEach((value, i) => {
    context.globalAlpha = image ? 0.15 + 0.6 * (value / most) : 1;
    context.fillStyle = colour(value / most);
    context.fillRect((i % cols) * size, Math.floor(i / cols) * size, size, size);
  });
  context.globalAlpha = 1;
  if (marked !== null) {
    context.strokeStyle = "#f00";
    context.lineWidth = 2;
    context.strokeRect((marked % cols) * size + 1, Math.floor(marked / cols) * size + 1, size - 2, size - 2);
  }
}
function drawMaps() {
  const { rows, cols, patches } = data;
  const square = patches * patches;
  const slice = (packed, start, length) => packed.values.subarray(start, start + length);
  heat($("mean-map"), patches, patches, slice(meanMaps, index() * square, square));
  const [high, wide] = [2 * rows - 1, 2 * cols - 1];
  heat($("offset-map"), high, wide, offsetMaps.subarray(index() * high * wide, (index() + 1) * high * wide));
  const picture = $("images").querySelectorAll("img")[state.image];
  const at = state.image * data.layers * data.heads + index();
  heat($("class-map"), rows, cols, slice(classMaps, at * patches, patches), picture);
  $("class-caption").textContent = `${data.prefix ? "What the class token looks at" : "What the patches look at on average"}, at most ${number(classMaps.scale[at])}`;
  const example = state.image < data.examples;
  const source = example ? exampleMaps : meanMaps;
  const map = example ? at : index();
  heat($("patch-map"), rows, cols, slice(source, map * square + state.patch * patches, patches), picture, state.patch);
  $("patch-map").dataset.patch = state.patch;
  $("patch-caption").textContent = `What the framed patch looks at${example ? " in this image" : ", averaged over images"}`;
}
function draw() {
  $("head-name").textContent = `${state.layer}.${state.head}`;
  const strength = data.strength;
  $("head-facts").textContent = Object.keys(strength).map((name) => `${name} ${number(strength[name][index()])}`).join(", ");
  for (const view of [drawImages, drawImportance, drawPartial, drawCurve, drawProfile, drawTrend, drawScatter, drawMaps]) view();
  history.replaceState(null, "", `#head=${state.layer}.${state.head}&image=${state.image}`);
}

$("model").textContent = data.model;
$("summary").textContent = `${data.layers} layers of ${data.heads} heads, ${data.prefix} prefix tokens and ${data.rows} x ${data.cols} patches; ${data.num_images} images` +
  (data.images.length < data.num_images ? `, the first ${data.images.length} of which are shown.` : ".");
options($("metric"), data.metrics.map((name) => [name, name]));
$("metric").value = data.ranking;
options($("pruning"), Object.keys(data.importance).map((name) => [name, { leave_one_out: "removed one at a time", keep_one: "alone in their layer" }[name]]));
options($("quantity"), Object.keys(data.strength).map((name) => [name, name]));
options($("features"), Object.keys(data.clusters).map((name) => [name, { maps: "maps", offsets: "offset maps", profile: "ring profiles" }[name]]));
$("clusters").addEventListener("change", () => { state.k = Math.round(+$("clusters").value); draw(); });
headGrid($("importance"), () => "");
headGrid($("profiles"), sparkline);
$("images").innerHTML = data.images.map((source, i) => `<button title="Image ${i}: ${escaped(data.facts[i])}"><img src="${source}" alt="Image ${i}"></button>`).join("");
$("images").addEventListener("click", (event) => {
  const cell = event.target.closest("button");
  if (!cell) return;
  state.image = [...$("images").children].indexOf(cell);
  draw();
});
$("images").querySelectorAll("img").forEach((image) => image.addEventListener("load", drawMaps));
$("scatter").addEventListener("click", (event) => {
  const at = event.target.dataset && event.target.dataset.index;
  if (at !== undefined) select(Math.floor(at / data.heads), at % data.heads);
});
$("patch-map").addEventListener("click", (event) => {
  const box = event.target.getBoundingClientRect();
  const col = clamp(Math.floor(((event.clientX - box.left) / box.width) * data.cols), 0, data.cols - 1);
  const row = clamp(Math.floor(((event.clientY - box.top) / box.height) * data.rows), 0, data.rows - 1);
  state.patch = row * data.cols + col;
  drawMaps();
});
$("patch-map").addEventListener("keydown", (event) => {
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!move) return;
  event.preventDefault();
  const row = clamp(Math.floor(state.patch / data.cols) + move[0], 0, data.rows - 1);
  const col = clamp((state.patch % data.cols) + move[1], 0, data.cols - 1);
  state.patch = row * data.cols + col;
  drawMaps();
});
const wanted = new URLSearchParams(location.hash.slice(1));
if (/^\d+\.\d+$/.test(wanted.get("head") || "")) [state.layer, state.head] = wanted.get("head").split(".").map(Number);
if (/^\d+$/.test(wanted.get("image") || "")) state.image = clamp(+wanted.get("image"), 0, data.images.length - 1);
select(state.layer, state.head);
