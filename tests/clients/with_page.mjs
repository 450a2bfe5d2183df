// The chat page's reader of streams, and what it shows of an answer.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

const { events } = await load("stream.js");

async function load(name) {
  const source = await readFile(new URL(`../../device/http/page/${name}`, import.meta.url), "utf8");
  return import(`data:text/javascript,${encodeURIComponent(source)}`);
}

/** As much of a document's element as the page needs to show tokens. */
class Element {
  children = [];
  dataset = {};
  textContent = "";
  append(...parts) {
    this.children.push(...parts);
  }
  setAttribute() {}
  addEventListener() {}
}

test("comments that keep a stream open are no events", async () => {
  const text = 'data: {"a": 1}\n\n: keep-alive\n\ndata: {"a": 2}\n\ndata: [DONE]\n\n';
  for (const size of [1, 7, 1000]) {
    const parts = [];
    for (let at = 0; at < text.length; at += size) parts.push(new TextEncoder().encode(text.slice(at, at + size)));
    const found = [];
    for await (const event of events(ReadableStream.from(parts))) found.push(event.a);
    assert.deepEqual(found, [1, 2]);
  }
});

test("unverified text is a token of its own, also without a round before it", async () => {
  const elements = { createElement: () => new Element(), getElementById: () => new Element() };
  globalThis.document = { ...elements, addEventListener() {} };
  const { Tokens } = await load("tokens.js");
  const verified = { text: "One", origin: "accepted", margin: null };
  for (const rounds of [[], [{ round: 1, tokens: [verified] }]]) {
    const body = new Element();
    const tokens = new Tokens(body);
    for (const round of rounds) tokens.add(round);
    tokens.addUnverified(" two");
    const shown = body.children.map((span) => [span.textContent, span.dataset.origin]);
    assert.deepEqual(shown, [...rounds.map(() => ["One", "accepted"]), [" two", "unverified"]]);
  }
});
