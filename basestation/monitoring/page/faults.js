// The list of the latest faults.

import { deviceLink } from "./devices.js";
import { element } from "./element.js";
import { ago } from "./format.js";

export function faultItem(fault) {
  const sender = fault.reported ? "reported by" : "sent to";
  return element("li", "", [
    element("p", "note", [
      element("code", "", fault.code), ` ${sender} `, deviceLink(fault.device), `, ${ago(fault.age)}`,
    ]),
    element("p", "message", fault.text),
  ]);
}
