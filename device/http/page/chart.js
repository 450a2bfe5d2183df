// The last rounds as bars and as a table: how much was drafted, accepted, and chosen to be drafted.

const SHOWN = 24;
const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, FLOOR, AXIS] = [300, 110, 104, 18];
const STEP = (WIDTH - AXIS) / SHOWN;
const chart = document.getElementById("chart");
const table = document.getElementById("rounds");
const chosenLabel = document.getElementById("chosen-label");
let rounds = [];

/** Forget all rounds. */
export function clear() {
  rounds = [];
  draw();
}

/** Add a round; `draftLen` is the fixed draft length, or "auto" where the planner chooses. */
export function add(round, draftLen) {
  const automatic = draftLen === "auto";
  const chosen = automatic || !round.drafted ? round.drafted : Math.min(Number(draftLen), round.draft_len);
  rounds = [...rounds, { ...round, chosen }].slice(-SHOWN);
  chosenLabel.textContent = automatic ? "planner’s choice" : "fixed length";
  draw();
}

function draw() {
  const highest = Math.max(4, ...rounds.map((round) => Math.max(round.drafted, round.chosen)));
  const scale = (FLOOR - 10) / highest;
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": summary() });
  for (const count of [0, highest]) {
    const y = FLOOR - count * scale;
    svg.append(element("line", { class: "axis", x1: AXIS, x2: WIDTH, y1: y, y2: y }));
    const text = element("text", { x: AXIS - 5, y: y + 3.5 });
    text.textContent = count;
    svg.append(text);
  }
  rounds.forEach((round, index) => svg.append(...bar(round, AXIS + index * STEP + 1, scale)));
  chart.replaceChildren(svg);
  table.replaceChildren(...rounds.map(row).reverse());
}

function bar(round, x, scale) {
  const width = STEP - 2;
  if (!round.drafted) return [element("rect", { class: "alone", x, y: FLOOR - 4, width, height: 4, rx: 1.5 })];
  const box = (name, count) =>
    element("rect", { class: name, x, y: FLOOR - count * scale, width, height: count * scale, rx: 1.5 });
  const y = FLOOR - round.chosen * scale;
  return [
    box("drafted", round.drafted),
    box("accepted", round.accepted),
    element("line", { class: "chosen", x1: x - 0.5, x2: x + width + 0.5, y1: y, y2: y }),
  ];
}

function row(round) {
  const choice = round.drafted ? `draft ${round.chosen}` : "target alone";
  const milliseconds = (1000 * (round.draft_seconds + round.reply_seconds)).toFixed(0);
  const line = document.createElement("tr");
  for (const value of [round.round, round.drafted, round.accepted, choice, milliseconds, round.uplink_bytes]) {
    line.insertCell().textContent = value;
  }
  return line;
}

function summary() {
  if (!rounds.length) return "No rounds yet";
  const sum = (name) => rounds.reduce((total, round) => total + round[name], 0);
  const alone = rounds.filter((round) => !round.drafted).length;
  return (
    `Last ${rounds.length} rounds: ${sum("drafted")} tokens drafted, ${sum("accepted")} accepted; ` +
    `in ${alone} the target decoded alone`
  );
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

draw();
