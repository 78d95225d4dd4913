// Receives the snapshots and shows the newest. Each is complete, so none is kept.

import { byId, clock, say, several, span, teamColours } from "./dom.js";
import { drawCharts } from "./charts.js";
import { showJobs } from "./jobs.js";
import { drawTopology } from "./topology.js";
import { showDetails, showEvents, showFigures, showHandlers, showLanes, showMaps, showProcesses, showRequests, showSecurity } from "./tables.js";

const SILENT_MS = 3500; // without a snapshot, of which one arrives every second
const KEPT = 300;

let snapshot = null;
let cameAt = performance.now();
let picked = null;
let isAsked = false;

const source = new EventSource("frames");
source.onmessage = (message) => {
  snapshot = JSON.parse(message.data);
  cameAt = performance.now();
  show();
};

setInterval(() => alarm(), 1000);
addEventListener("resize", show);
document.addEventListener("visibilitychange", show);
byId("wanted").addEventListener("input", show);
byId("wanted").addEventListener("submit", (event) => event.preventDefault());

function pick(id) {
  picked = id;
  show();
}

// At most once a frame of the screen; a page in the background waits.
function show() {
  if (isAsked || !snapshot || document.hidden) return;
  isAsked = true;
  requestAnimationFrame(() => {
    isAsked = false;
    draw();
  });
}

function draw() {
  const byName = new Map(snapshot.processes.map((p) => [p.id, p]));
  if (!byName.has(picked)) picked = snapshot.asked.id || snapshot.processes[0]?.id;
  const asked = byName.get(snapshot.asked.id);
  const hosts = new Set(snapshot.processes.map((p) => p.host));
  const colours = teamColours(snapshot.processes);
  say(byId("asked"), asked ? `${asked.id}, ${asked.role.replace("_", " ")} at ${snapshot.asked.address}` : snapshot.asked.address);
  say(byId("workers"), asked ? `${several(snapshot.processes.length, "process")} on ${several(hosts.size, "host")}` : "");
  say(byId("clock"), clock(snapshot.at));
  say(byId("series-of"), asked ? `${asked.role.replace("_", " ")} ${asked.id}` : "Figures");
  showSecurity(snapshot.security);
  showFigures(asked && asked.health !== "gone" ? asked : undefined, snapshot);
  drawTopology(snapshot, colours, picked, pick);
  drawCharts(snapshot.course, snapshot.interval_s, KEPT);
  showDetails(snapshot, byName.get(picked));
  showProcesses(snapshot, colours, picked, pick);
  showLanes(snapshot);
  showMaps(snapshot);
  showJobs(snapshot);
  showHandlers(snapshot);
  showRequests(snapshot, snapshot.asked.address, show);
  showEvents(snapshot);
  alarm();
}

// Says in a sentence what must not be overlooked.
function alarm() {
  const silent_s = (performance.now() - cameAt) / 1000;
  const words = silent_s * 1000 > SILENT_MS ? ownServerGone(silent_s) : snapshot ? askedGone() : "";
  document.body.classList.toggle("stale", silent_s * 1000 > SILENT_MS);
  say(byId("alarm"), words);
  byId("alarm").hidden = !words;
  const gone = snapshot?.processes.filter((p) => p.health === "gone").length ?? 0;
  const title = words ? "! overlay" : gone ? `${gone} gone, overlay` : "overlay";
  if (document.title !== title) document.title = title;
}

function ownServerGone(silent_s) {
  const old = snapshot ? ` What you see is from ${clock(snapshot.at)}.` : "";
  return `No news from this page's own server for ${span(silent_s)}.${old} It is asked again every second; start it with: python client.py HOST PORT web`;
}

function askedGone() {
  const { id, address, health, why, for_s } = snapshot.asked;
  if (health !== "gone" && health !== "unseen") return "";
  if (!id) return `No process has answered at ${address} yet (${why}). It is asked every second.`;
  const role = snapshot.processes.find((p) => p.id === id)?.role.replace("_", " ") ?? "process";
  return `The ${role} ${id} has been gone for ${span(for_s)} (${why}). It is asked every second; the other processes are shown as they are now.`;
}
