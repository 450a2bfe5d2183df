// Figures as text. Null, a figure without a denominator, is a dash.

const NONE = "–";

const plain = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

export const count = (value) => (value === null ? NONE : plain.format(value));

export const share = (value) => (value === null ? NONE : `${Math.round(100 * value)} %`);

export function rate(bytes) {
  if (bytes === null) return NONE;
  const units = ["B/s", "kB/s", "MB/s", "GB/s"];
  const step = bytes < 1000 ? 0 : Math.min(3, Math.floor(Math.log10(bytes) / 3));
  return `${plain.format(bytes / 1000 ** step)} ${units[step]}`;
}

export function duration(seconds) {
  if (seconds === null) return NONE;
  if (seconds < 1) return `${plain.format(1000 * seconds)} ms`;
  return `${plain.format(seconds)} s`;
}

export function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 90 * 60) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 36 * 3600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}
