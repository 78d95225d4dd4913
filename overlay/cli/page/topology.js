// The drawing: hosts as boxes, in them the processes in columns by rank, and links between them.
// With more than a dozen workers, leaders stand on the left and the hosts show workers as tiles.

import { byId, count, el, fullness, keep, ms, rate, say, set, span, stateOf } from "./dom.js";

const MOST_CARDS = 12, MOST_BUNDLES = 20, NARROW = 560;
const CARD = 56, SLIM = 40, LEADER = 80, HEAD = 22, TILE = { width: 52, height: 34, gap: 4 };
const SIGNS = {
  well: "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0",
  impaired: "M0-5.5L5.5 4.5H-5.5Z",
  stopping: "M-4.5-4.5H4.5V4.5H-4.5Z",
  gone: "M-5-3.3L-3.3-5L0-1.7L3.3-5L5-3.3L1.7 0L5 3.3L3.3 5L0 1.7L-3.3 5L-5 3.3L-1.7 0Z",
};
SIGNS.unseen = SIGNS.asking = SIGNS.well;

let nodes = [];

export function drawTopology(snapshot, colours, picked, pick) {
  const svg = byId("drawing");
  const width = svg.clientWidth || 600;
  const plan = layOut(snapshot, width);
  nodes = plan.nodes;
  set(svg, { height: plan.height, viewBox: `0 0 ${width} ${plan.height}` });
  const layer = (name) => svg.querySelector(`.${name}`) ?? svg.appendChild(el("g", { class: name }));

  keep(layer("hosts"), plan.hosts, (h) => h.name, () => el("g", { class: "host" }, el("rect", { rx: 5 }), el("text")), drawHost);
  const links = linksOf(snapshot, plan, picked);
  keep(layer("links"), links, (l) => l.key,
    () => el("g", { class: "link" }, el("path"), el("text")),
    drawLink);
  const current = nodes.some((n) => n.id === picked) ? picked : nodes[0]?.id;
  keep(layer("nodes"), nodes, (n) => n.id, (n) => makeNode(n, pick), (g, node) => {
    drawNode(g, node, colours.get(node.process.team), node.id === picked);
    set(g, { tabindex: node.id === current ? 0 : -1 });
  });
}

// Where everything is; draws nothing.
function layOut({ processes }, width) {
  const workers = processes.filter((p) => p.rank === 0).length;
  return workers > MOST_CARDS ? layOutMany(processes, width) : layOutFew(processes, width);
}

// Hosts as bands, ranks as columns across them.
function layOutFew(processes, width) {
  const isNarrow = width < NARROW;
  const pad = isNarrow ? 8 : 14;
  const ranks = ranksOf(processes);
  const inner = width - 2 * pad;
  const least = isNarrow ? 30 : 118;
  const card = Math.max(72, Math.min(156, (inner - (ranks.length - 1) * least) / ranks.length));
  const step = ranks.length > 1 ? (inner - card) / (ranks.length - 1) : 0;
  const plan = { hosts: [], nodes: [], height: 0 };
  let top = 0;
  for (const [name, here] of groupBy(processes, (p) => p.host)) {
    const cells = ranks.map((rank, i) =>
      stack(here.filter((p) => p.rank === rank), pad + i * step, card, processes.length > 8 ? 12 : 24));
    const height = Math.max(...cells.map((cell) => cell.height));
    for (const cell of cells) {
      for (const node of cell.nodes) plan.nodes.push({ ...node, y: node.y + top + HEAD + (height - cell.height) / 2 });
    }
    plan.hosts.push({ name, x: 0.5, y: top + 0.5, width: width - 1, height: height + HEAD + pad - 1 });
    top += height + HEAD + pad + 8;
  }
  plan.height = Math.max(0, top - 8);
  return plan;
}

// Leaders in columns on the left; on the right the hosts with their workers as tiles, by team.
function layOutMany(processes, width) {
  const isNarrow = width < NARROW;
  const card = isNarrow ? 66 : 128, gap = isNarrow ? 14 : 104, lastGap = isNarrow ? 14 : 60;
  const askers = ranksOf(processes).filter((rank) => rank > 0);
  const plan = { hosts: [], nodes: [], height: 0 };
  const columns = askers.map((rank, i) => stack(processes.filter((p) => p.rank === rank), i * (card + gap), card, 8, true));
  const x = askers.length * (card + gap) - gap + lastGap;
  const room = width - x, tile = TILE.width + TILE.gap;
  const workers = processes.filter((p) => p.rank === 0);
  const hosts = [...groupBy(workers, (p) => p.host)];
  const widest = Math.max(...hosts.map(([, mine]) => Math.min(mine.length, 6)));
  const perRow = Math.max(1, Math.min(widest, Math.floor((room - 12 + TILE.gap) / tile)));
  const box = Math.max(perRow * tile + 8, Math.min(room, 108));
  const across = Math.max(1, Math.floor((room + 8) / (box + 8)));
  const bottoms = new Array(across).fill(0);
  for (const [name, mine] of hosts) {
    const column = bottoms.indexOf(Math.min(...bottoms));
    const place = { x: x + column * (box + 8), y: bottoms[column] };
    const height = HEAD + Math.ceil(mine.length / perRow) * (TILE.height + TILE.gap) + 4;
    plan.hosts.push({ name, ...place, width: box, height });
    [...groupBy(mine, (p) => p.team).values()].flat().forEach((process, i) => plan.nodes.push({
      id: process.id, process, host: name, isTile: true, width: TILE.width, height: TILE.height,
      x: place.x + 6 + (i % perRow) * tile,
      y: place.y + HEAD + Math.floor(i / perRow) * (TILE.height + TILE.gap),
    }));
    bottoms[column] += height + 8;
  }
  plan.height = Math.max(...bottoms, ...columns.map((column) => column.height + 8)) - 8;
  for (const column of columns) {
    for (const node of column.nodes) plan.nodes.unshift({ ...node, y: node.y + (plan.height - column.height) / 2 });
  }
  return plan;
}

const ranksOf = (processes) => [...new Set(processes.map((p) => p.rank))].sort((a, b) => b - a);

function stack(processes, x, width, gap, isSlim = false) {
  let y = 0;
  const nodes = processes.map((process) => {
    const height = process.rank === 2 ? LEADER : isSlim ? SLIM : CARD;
    const node = { id: process.id, process, x, y, width, height, isSlim: isSlim && process.rank < 2 };
    y += height + gap;
    return node;
  });
  return { nodes, height: Math.max(0, y - gap) };
}

// One link for each pair, and one for all of a host's tiles. Where these would be too many, only
// those with a problem and those of the selected process.
function linksOf(snapshot, plan, picked) {
  const byNode = new Map(plan.nodes.map((n) => [n.id, n]));
  const hosts = new Map(plan.hosts.map((h) => [h.name, h]));
  const known = snapshot.links.filter((l) => byNode.has(l.from) && byNode.has(l.to));
  const links = known.filter((l) => !byNode.get(l.to).isTile).map((l) => link(l.from, [l], byNode.get(l.to)));
  const bundles = [...groupBy(known.filter((l) => byNode.get(l.to).isTile), (l) => `${l.from}>${byNode.get(l.to).host}`).values()];
  const isMany = bundles.length > MOST_BUNDLES;
  for (const all of bundles) {
    const mine = all.filter((l) => l.to === picked);
    const troubled = all.filter((l) => l.state !== "up" || l.health !== "healthy");
    if (!isMany || all[0].from === picked) links.push(link(all[0].from, all, hosts.get(byNode.get(all[0].to).host)));
    for (const l of isMany ? new Set([...mine, ...troubled]) : mine) links.push(link(l.from, [l], byNode.get(l.to)));
  }
  spreadPorts(links, "from", "to");
  spreadPorts(links, "to", "from");
  return links;

  function link(from, all, to) {
    return { key: `${from}>${to.id ?? `host ${to.name}`}`, all, from: byNode.get(from), to };
  }
}

// Gives each end of a link its own height on its box, so that links neither meet nor cross.
function spreadPorts(links, end, other) {
  const middle = (box) => box.y + box.height / 2;
  for (const [box, mine] of groupBy(links, (l) => l[end])) {
    mine.sort((a, b) => middle(a[other]) - middle(b[other]));
    const step = Math.min(18, (box.height - 12) / mine.length);
    mine.forEach((link, i) => { link[`${end}Y`] = middle(box) + (i - (mine.length - 1) / 2) * step; });
  }
}

function drawLink(g, { all, from, to, fromY, toY }) {
  const x1 = from.x + from.width, x2 = to.x, gap = x2 - x1;
  const hasWords = gap >= 100 && !to.isTile;
  const flat = !hasWords ? x2 : x2 - Math.min(96, gap * 0.6); // the words stand on the flat end
  const bend = (flat - x1) * 0.5;
  const flow = all.reduce((sum, link) => sum + (link.state === "up" ? link.rate : 0), 0);
  const [kind, words] = standing(all, flow);
  set(g, { class: `link ${kind}` });
  set(g.firstChild, {
    d: `M${x1} ${fromY}C${x1 + bend} ${fromY} ${flat - bend} ${toY} ${flat} ${toY}H${x2}`,
    "stroke-width": null,
  });
  g.firstChild.style.strokeWidth = kind === "flows" ? `${Math.min(5, 1.5 + Math.log10(1 + flow) * 0.7)}px` : "";
  set(g.lastChild, { x: x2 - 7, y: toY - 5 });
  say(g.lastChild, hasWords ? words : "");
}

// The state of a link or of a bundle of them: a class for its style, and words.
function standing(all, flow) {
  const of = (state) => all.filter((link) => link.state === state);
  const part = (some) => (all.length > 1 ? `${some.length} of ${all.length} ` : "");
  const down = of("down"), unwell = all.filter((l) => l.state === "up" && l.health !== "healthy");
  if (down.length) return ["down", `${part(down)}down ${span(Math.max(...down.map((l) => l.for_s)))}`];
  if (of("unknown").length) return ["unknown", "not known"];
  if (of("draining").length) return ["draining", `${part(of("draining"))}stopping`];
  const rtt = Math.max(...all.map((link) => link.rtt_ms));
  const figures = [flow > 0 && `${rate(flow)}/s`, rtt > 0 && `${ms(rtt)} ms`].filter(Boolean).join(" · ");
  if (unwell.length) return ["unwell", `${part(unwell)}${unwell[0].health} · ${figures}`];
  return [flow > 0 ? "flows" : "", figures];
}

function drawHost(g, { x, y, width, height, name }) {
  set(g.firstChild, { x, y, width, height });
  set(g.lastChild, { x: x + 8, y: y + 14.5 });
  say(g.lastChild, cut(name, Math.floor(width / 6.5)));
}

function makeNode(node, pick) {
  const g = el("g", { role: "button" },
    el("title"), el("rect", { class: "box", rx: 4 }), el("rect", { class: "stripe" }), el("path", { class: "sign" }),
    el("text", { class: "name" }), el("text", { class: "role dim" }), el("text", { class: "says" }),
    el("text", { class: "more dim" }), el("rect", { class: "slots", rx: 2 }), el("rect", { class: "used", rx: 2 }));
  g.addEventListener("click", () => pick(node.id));
  g.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") pick(node.id);
    else if (!move(node.id, event.key)) return;
    event.preventDefault();
  });
  g.dataset.id = node.id;
  return g;
}

function drawNode(g, node, colour, isPicked) {
  const { process, x, y, width, height, isTile, isSlim } = node;
  const part = (name) => g.querySelector(`.${name}`);
  const isLeader = process.rank === 2;
  const [used, of] = isLeader ? [process.queued ?? 0, process.queue_slots ?? 0] : [process.in_service ?? 0, process.slots ?? 0];
  const state = stateOf(process);
  const isThere = ["well", "impaired", "stopping"].includes(process.health);
  const role = process.role.replace("_", " ");
  const label = `${process.id}, ${role} of team ${process.team} on ${process.host}: ${state}`;
  set(g, {
    class: `node ${process.health}${isPicked ? " is-picked" : ""}${isTile ? " is-tile" : ""}`, "aria-pressed": isPicked,
    "aria-label": isThere ? `${label}, ${rate(process.rates.completed)} answers a second` : `${label}, ${process.why}`,
    transform: `translate(${x} ${y})`,
  });
  say(g.querySelector("title"), process.why ? `${label}: ${process.why}` : label);
  set(part("box"), { width, height });
  g.querySelector(".stripe, [class^=team]").setAttribute("class", `stripe team-${colour}`);
  set(part("stripe"), { x: 0, y: 4, width: 3, height: height - 8 });
  const base = isTile ? 14 : 17;
  set(part("sign"), { d: SIGNS[process.health], transform: `translate(${isTile ? 12 : 15} ${base - 4.5})${isTile ? " scale(.8)" : ""}` });
  set(part("name"), { x: isTile ? 20 : 25, y: base });
  say(part("name"), cut(process.id, isTile ? 4 : Math.floor((width - 30) / 8)));
  const room = width - 34 - process.id.length * 8;
  set(part("role"), { x: width - 8, y: base, "text-anchor": "end" });
  const working = `${rate(process.rates.completed ?? 0)}/s`;
  const first = isSlim ? (isThere ? working : "") : role;
  say(part("role"), !isTile && room > first.length * 6 ? first : "");
  set(part("says"), { x: isTile ? 8 : 10, y: isTile ? 27 : isSlim ? 32 : 35, class: isTile || (isSlim && isThere) ? "says dim" : "says" });
  say(part("says"), isTile ? (isThere ? working : "") : cut(isThere && process.health !== "stopping" ? (isSlim ? process.host : working) : state, Math.floor(width / 6.6)));
  set(part("more"), isLeader ? { x: 10, y: 53, "text-anchor": null } : { x: width - 8, y: 35, "text-anchor": "end" });
  const full = isLeader ? (width < 104 ? `${width < 80 ? "" : "queue "}${used}/${of}` : `queue ${count(used)} of ${count(of)}`) : `${count(used)} of ${count(of)}`;
  say(part("more"), isTile || isSlim || !isThere || process.health === "stopping" || (!isLeader && width < 104) ? "" : full);
  const long = Math.max(0, width - (isTile ? 16 : 20));
  const bar = { x: isTile ? 8 : 10, y: isLeader ? 62 : isTile ? 29.5 : 44, height: isTile ? 2 : isLeader ? 7 : 4 };
  const isShown = isThere && of > 0 && !isSlim && !(isTile && used === 0);
  set(part("slots"), { ...bar, width: isShown ? long : 0 });
  set(part("used"), { ...bar, width: isShown ? long * Math.min(1, used / of) : 0, class: `used ${fullness(used, of)}` });
}

// Moves the focus to the nearest process in the direction of an arrow key; false for other keys.
function move(id, key) {
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  if (!way) return false;
  const centre = (n) => [n.x + n.width / 2, n.y + n.height / 2];
  const [x, y] = centre(nodes.find((n) => n.id === id));
  let best = null, least = Infinity;
  for (const node of nodes) {
    const [dx, dy] = [centre(node)[0] - x, centre(node)[1] - y];
    const along = dx * way[0] + dy * way[1], aside = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
    if (along > 4 && along + 2 * aside < least) [best, least] = [node, along + 2 * aside];
  }
  const shown = best && byId("drawing").querySelector(`[data-id="${CSS.escape(best.id)}"]`);
  shown?.focus();
  return true;
}

const cut = (text, most) => (text.length > most ? `${text.slice(0, Math.max(1, most - 1))}…` : text);

function groupBy(items, key) {
  const groups = new Map();
  for (const item of items) {
    const name = key(item);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(item);
  }
  return groups;
}
