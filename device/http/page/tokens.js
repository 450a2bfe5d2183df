// An answer as tokens: each tinted by its origin, its round and margin shown when it is pointed at.

const LABELS = new Map([
  ["accepted", "accepted draft"],
  ["recovered", "recovered"],
  ["bonus", "bonus"],
  ["target", "target alone"],
  ["lookup", "prompt lookup"],
]);
const KNOWN = LABELS.size;
const OTHER_HUES = 3;
const legend = document.getElementById("legend");
const details = document.getElementById("details");
const shown = new WeakMap();
let current = null;

for (const origin of LABELS.keys()) legend.append(legendEntry(origin));

/** The tokens of one answer. */
export class Tokens {
  constructor(element) {
    this.element = element;
    element.tabIndex = 0;
    element.setAttribute("role", "group");
    element.setAttribute("aria-label", "Answer; the arrow keys go through its tokens");
    element.addEventListener("pointerover", (event) => event.pointerType === "mouse" && point(tokenOf(event)));
    element.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null));
    element.addEventListener("click", (event) => point(tokenOf(event)));
    element.addEventListener("blur", () => point(null));
    element.addEventListener("keydown", (event) => this.#move(event));
  }

  /** Append the tokens of a round, as the service reports it. */
  add(round) {
    for (const token of round.tokens) this.#append(token, round);
  }

  /** Append text that no base station has verified, which belongs to no round. */
  addUnverified(text) {
    this.#append({ text, origin: "unverified", margin: null }, null);
  }

  /** Append text that belongs to the last token. */
  addText(text) {
    this.element.lastElementChild?.append(text);
  }

  get text() {
    return this.element.textContent;
  }

  #append(token, round) {
    const span = document.createElement("span");
    span.className = "token";
    span.textContent = token.text;
    tint(span, token.origin);
    shown.set(span, { token, round });
    this.element.append(span);
  }

  #move(event) {
    const spans = [...this.element.children].filter((span) => span.textContent !== "");
    const last = spans.length - 1;
    const at = spans.indexOf(current);
    const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? last : at - 1, Home: 0, End: last }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    point(spans[Math.max(0, Math.min(last, to))]);
  }
}

document.addEventListener("keydown", (event) => event.key === "Escape" && point(null));
document.addEventListener("scroll", () => current && place(current), { passive: true });

function tokenOf(event) {
  return event.target.closest(".token");
}

/** Show the details of a token, or of none. */
function point(span) {
  current?.classList.remove("current");
  current = span;
  if (span === null) {
    details.textContent = "";
    return;
  }
  span.classList.add("current");
  const { token, round } = shown.get(span);
  const margin = token.margin === null ? "" : ` · margin ${token.margin.toFixed(2)}`;
  const where = round === null ? "" : ` · round ${round.round}`;
  details.textContent = `“${token.text.trim()}” · ${label(token.origin)}${where}${margin}`;
  place(span);
}

/** Put the details above the start of a token, or below where there is no room. */
function place(span) {
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - details.offsetWidth - 8);
  const above = box.top - details.offsetHeight - 6;
  details.style.left = `${Math.max(8, left)}px`;
  details.style.top = `${above < 8 ? box.bottom + 6 : above}px`;
}

/** An origin that this page does not know gets an entry and a colour when it first appears. */
function tint(element, origin) {
  if (!LABELS.has(origin)) {
    LABELS.set(origin, origin);
    legend.append(legendEntry(origin));
  }
  element.dataset.origin = origin;
  const index = [...LABELS.keys()].indexOf(origin) - KNOWN;
  if (index >= 0) element.dataset.other = index % OTHER_HUES;
}

function legendEntry(origin) {
  const entry = document.createElement("li");
  const swatch = document.createElement("i");
  swatch.className = "token swatch";
  tint(swatch, origin);
  entry.append(swatch, label(origin));
  return entry;
}

function label(origin) {
  return LABELS.get(origin);
}
