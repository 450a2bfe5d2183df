// Asks the base station for its figures, and shows them; "#device=NAME" selects one device.

import { Chart } from "./chart.js";
import { DeviceTable } from "./devices.js";
import { faultItem } from "./faults.js";
import { count, duration, rate, share } from "./format.js";

const POLL_MS = 5000;
const TIMEOUT_MS = 10000;
const LEAST_SPAN_SECONDS = 120;

const TRAFFIC = [
  { title: "Tokens per second", lines: [{ column: "tokens_per_second" }], format: count },
  { title: "Acceptance", lines: [{ column: "acceptance" }], format: share, top: 1 },
  { title: "Sessions", lines: [{ column: "sessions" }], format: count },
  {
    title: "Traffic",
    lines: [{ column: "uplink_bytes_per_second", label: "up" }, { column: "downlink_bytes_per_second", label: "down" }],
    format: rate,
  },
];
const QUEUEING = { title: "Queueing delay", lines: [{ column: "queueing_seconds" }], format: duration };
const FAULTS = { title: "Faults", lines: [{ column: "faults" }], format: count };
const STATION = [
  ...TRAFFIC,
  {
    title: "Batch size",
    lines: [{ column: "batch_sessions", label: "sessions" }, { column: "batch_tokens", label: "tokens" }],
    format: count,
  },
  QUEUEING,
  {
    title: "Forward pass",
    lines: [{ column: "forward_seconds", label: "target" }, { column: "verify_seconds", label: "verify" }],
    format: duration,
  },
  { title: "KV pool in use", lines: [{ column: "kv_share" }], format: share, top: 1 },
  { title: "Evictions", lines: [{ column: "evictions" }], format: count },
  FAULTS,
];
const DEVICE = [...TRAFFIC, QUEUEING, FAULTS];

const part = (id) => document.getElementById(id);
const stationCharts = addCharts(part("station"), STATION);
const deviceCharts = addCharts(part("detail-charts"), DEVICE);
const table = new DeviceTable(part("devices"));
let timer = 0;
let answeredAt = null;

function addCharts(parent, descriptions) {
  const charts = descriptions.map((description) => new Chart(description));
  parent.append(...charts.map((chart) => chart.root));
  return charts;
}

function selectedDevice() {
  return new URLSearchParams(location.hash.slice(1)).get("device");
}

function show(report) {
  const selected = selectedDevice();
  const span = Math.max(LEAST_SPAN_SECONDS, report.history.age[0] ?? 0);
  const minutes = `${Math.round(span / 60)} minutes`;
  document.querySelectorAll(".span").forEach((place) => { place.textContent = minutes; });
  stationCharts.forEach((chart) => chart.update(report.last_minute, report.history, span));
  table.update(report.devices, selected);
  showText(part("unreadable"), report.unreadable && `Which devices are enrolled is unknown: ${report.unreadable}`);
  part("no-faults").hidden = report.faults.length > 0;
  part("faults").hidden = report.faults.length === 0;
  part("faults").replaceChildren(...report.faults.map(faultItem));
  if (report.device && report.device.name === selected) showDevice(report.device, report.devices, span);
}

function showDevice({ name, history }, devices, span) {
  const lastMinute = devices.find((device) => device.name === name);
  part("detail-title").textContent = name;
  part("unknown").hidden = lastMinute !== undefined;
  deviceCharts.forEach((chart) => chart.update(lastMinute ?? {}, history, span));
  if (part("detail").hidden) {
    part("detail").hidden = false;
    part("detail-title").focus();
  }
}

function showText(element, text) {
  element.hidden = !text;
  if (element.textContent !== text) element.textContent = text;
}

function showStatus(state, text) {
  const status = part("status");
  status.className = state;
  if (status.textContent !== text) status.textContent = text; // read out only when it changes
}

async function poll() {
  clearTimeout(timer);
  const selected = selectedDevice();
  const query = selected === null ? "" : `?device=${encodeURIComponent(selected)}`;
  try {
    const answer = await fetch(`/fleet.json${query}`, { signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const report = await answer.json();
    answeredAt = new Date();
    show(report);
    if (!report.alive) showStatus("bad", "The base station makes no progress");
    else if (!report.ready) showStatus("waiting", "Not ready: loading its model, or draining");
    else showStatus("good", "Serving");
  } catch (error) {
    const since = answeredAt ? `; figures of ${answeredAt.toLocaleTimeString()}` : "";
    showStatus("bad", `The base station does not answer${since}`);
  }
  clearTimeout(timer);
  timer = setTimeout(poll, POLL_MS);
}

function select() {
  if (selectedDevice() === null && !part("detail").hidden) {
    part("detail").hidden = true;
    table.focus(part("detail-title").textContent);
  }
  poll();
}

part("host").textContent = location.host;
addEventListener("hashchange", select);
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : poll()));
poll();
