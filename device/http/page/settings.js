// The controls, as fields of a request.

const [speculation, draftLen, mode, temperature, temperatureValue] = [
  "speculation", "draft-len", "mode", "temperature", "temperature-value",
].map((id) => document.getElementById(id));
const LONGEST = 16;
const MODES = ["auto", "ids", "coupled", "topk", "topp", "full"];

for (let length = 1; length <= LONGEST; length++) draftLen.add(new Option(length));
draftLen.add(new Option("auto"), 0);
for (const name of MODES) mode.add(new Option(name));
draftLen.value = mode.value = "auto";
document.getElementById("settings").addEventListener("input", update);
update();

/** Set the controls to the defaults of the service. */
export function useDefaults(defaults) {
  temperature.value = defaults.temperature;
  speculation.checked = defaults.mode !== "target";
  if (speculation.checked) choose(mode, defaults.mode);
  choose(draftLen, defaults.draft_len);
  update();
}

/** The fields of the next request. */
export function fields() {
  return {
    temperature: Number(temperature.value),
    edgedraft: {
      mode: speculation.checked ? mode.value : "target",
      draft_len: draftLen.value === "auto" ? "auto" : Number(draftLen.value),
    },
  };
}

function choose(select, value) {
  if (![...select.options].some((option) => option.value === value)) select.add(new Option(value));
  select.value = value;
}

/** Mode ids is for temperature 0 only; without speculation nothing is drafted. */
function update() {
  temperatureValue.textContent = Number(temperature.value).toFixed(1);
  const ids = [...mode.options].find((option) => option.value === "ids");
  ids.disabled = Number(temperature.value) > 0;
  if (ids.disabled && mode.value === "ids") mode.value = "auto";
  mode.disabled = draftLen.disabled = !speculation.checked;
}
