// The table of the latest faults.

import { deviceLink } from "./devices.js";
import { element } from "./element.js";
import { ago } from "./format.js";

export function faultRow(fault) {
  const message = fault.reported ? [element("em", "", "reported by the device:"), ` ${fault.text}`] : fault.text;
  return element("tr", "", [
    element("td", "when", ago(fault.age)),
    element("td", "", [deviceLink(fault.device)]),
    element("td", "", [element("code", "", fault.code)]),
    element("td", "message", message),
  ]);
}
