// Takes the pictures as they come and shows the newest. Each is complete, so nothing is kept.

import { byId, clock, say, several, span, teamColours } from "./dom.js";
import { drawCharts } from "./charts.js";
import { drawTopology } from "./topology.js";
import { showDetails, showEvents, showFigures, showHandlers, showMaps, showProcesses, showRequests } from "./tables.js";

const SILENT_MS = 3500; // without a picture; one comes every second
const KEPT = 300;

let picture = null;
let cameAt = performance.now();
let picked = null;
let isAsked = false;

const source = new EventSource("frames");
source.onmessage = (message) => {
  picture = JSON.parse(message.data);
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
  if (isAsked || !picture || document.hidden) return;
  isAsked = true;
  requestAnimationFrame(() => {
    isAsked = false;
    draw();
  });
}

function draw() {
  const byName = new Map(picture.processes.map((p) => [p.id, p]));
  if (!byName.has(picked)) picked = picture.asked.id || picture.processes[0]?.id;
  const asked = byName.get(picture.asked.id);
  const hosts = new Set(picture.processes.map((p) => p.host));
  const colours = teamColours(picture.processes);
  say(byId("asked"), asked ? `${asked.id}, ${asked.role.replace("_", " ")} at ${picture.asked.address}` : picture.asked.address);
  say(byId("workers"), asked ? `${several(picture.processes.length, "process")} on ${several(hosts.size, "host")}` : "");
  say(byId("clock"), clock(picture.at));
  say(byId("courses-of"), asked ? `${asked.role.replace("_", " ")} ${asked.id}` : "Courses");
  showFigures(asked && asked.health !== "gone" ? asked : undefined, picture);
  drawTopology(picture, colours, picked, pick);
  drawCharts(picture.course, picture.interval_s, KEPT);
  showDetails(picture, byName.get(picked));
  showProcesses(picture, colours, picked, pick);
  showMaps(picture);
  showHandlers(picture);
  showRequests(picture, picture.asked.address, show);
  showEvents(picture);
  alarm();
}

// What must not be overlooked, in a sentence.
function alarm() {
  const silent_s = (performance.now() - cameAt) / 1000;
  const words = silent_s * 1000 > SILENT_MS ? ownServerGone(silent_s) : picture ? askedGone() : "";
  document.body.classList.toggle("stale", silent_s * 1000 > SILENT_MS);
  say(byId("alarm"), words);
  byId("alarm").hidden = !words;
  const gone = picture?.processes.filter((p) => p.health === "gone").length ?? 0;
  const title = words ? "! overlay" : gone ? `${gone} gone, overlay` : "overlay";
  if (document.title !== title) document.title = title;
}

function ownServerGone(silent_s) {
  const old = picture ? ` What you see is of ${clock(picture.at)}.` : "";
  return `No news from this page's own server for ${span(silent_s)}.${old} It is asked again every second; start it with: python client.py HOST PORT web`;
}

function askedGone() {
  const { id, address, health, why, for_s } = picture.asked;
  if (health !== "gone" && health !== "unseen") return "";
  if (!id) return `No process has answered at ${address} yet (${why}). It is asked every second.`;
  const role = picture.processes.find((p) => p.id === id)?.role.replace("_", " ") ?? "process";
  return `The ${role} ${id} has been gone for ${span(for_s)} (${why}). It is asked every second; the other processes are shown as they are now.`;
}
