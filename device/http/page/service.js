// The service that this page belongs to: its model, its answers, and the API key that it may ask for.

import { events } from "./stream.js";

export const ANSWERS = new URL("v1/chat/completions", document.baseURI);
const MODELS = new URL("v1/models", document.baseURI);
const STORED = "edgedraft-api-key";

export class KeyNeeded extends Error {}

export const hasKey = () => sessionStorage.getItem(STORED) !== null;
export const useKey = (key) => sessionStorage.setItem(STORED, key);

/** The first model, with the extension `edgedraft`: vocabulary size and defaults. */
export async function model() {
  const answer = await send(MODELS, {});
  return (await answer.json()).data[0];
}

/** The chunks of a streamed answer; ends with an exception when `signal` aborts. */
export async function* answer(request, signal) {
  const body = JSON.stringify(request);
  const response = await send(ANSWERS, { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
}

async function send(url, options) {
  const headers = { ...options.headers };
  if (hasKey()) headers.Authorization = `Bearer ${sessionStorage.getItem(STORED)}`;
  const response = await fetch(url, { ...options, headers });
  if (response.status === 401) throw new KeyNeeded();
  if (!response.ok) throw new Error(await reason(response));
  return response;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the service answered with status ${response.status}`;
  }
}
