// The table of devices. Rows stay in place between updates, so that the keyboard's focus does too.

import { element } from "./element.js";
import { ago, count, duration, rate, share } from "./format.js";

const ONLINE_SECONDS = 30;

export class DeviceTable {
  constructor(body) {
    this.body = body;
    this.rows = new Map();
  }

  update(devices, selected) {
    const rows = new Map(devices.map((device) => [device.name, this.row(device, device.name === selected)]));
    this.rows.forEach((row, name) => { if (!rows.has(name)) row.remove(); });
    this.rows = rows;
    [...rows.values()].forEach((row, at) => {
      if (row !== this.body.children[at]) this.body.insertBefore(row, this.body.children[at] ?? null);
    });
  }

  focus(name) {
    this.rows.get(name)?.querySelector("a").focus();
  }

  row(device, isSelected) {
    const row = this.rows.get(device.name) ?? newRow(device.name);
    const [name, ...cells] = row.children;
    if (isSelected) name.firstChild.setAttribute("aria-current", "true");
    else name.firstChild.removeAttribute("aria-current");
    const texts = [
      lastMessage(device), count(device.sessions ?? null), count(device.tokens_per_second ?? null),
      share(device.acceptance ?? null), rate(device.uplink_bytes_per_second ?? null),
      rate(device.downlink_bytes_per_second ?? null), duration(device.queueing_seconds ?? null),
      count(device.total_faults),
    ];
    cells.forEach((cell, at) => { cell.textContent = texts[at]; });
    row.className = state(device);
    cells.at(-1).classList.toggle("bad", device.total_faults > 0);
    return row;
  }
}

export function deviceLink(name) {
  const link = element("a", "", name);
  link.href = `#device=${encodeURIComponent(name)}`;
  return link;
}

function newRow(name) {
  const header = element("th", "", [deviceLink(name)]);
  header.scope = "row";
  const numbers = ["number wide", "number", "number", "number wide", "number wide", "number wide", "number"];
  return element("tr", "", [header, element("td", "seen"), ...numbers.map((kind) => element("td", kind))]);
}

function state(device) {
  if (device.seen_age === null) return "absent";
  return device.seen_age <= ONLINE_SECONDS ? "online" : "away";
}

function lastMessage(device) {
  const seen = device.seen_age === null ? "none yet" : ago(device.seen_age);
  return device.enrolled === false ? `${seen}, no enrolled key` : seen;
}
