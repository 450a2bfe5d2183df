// The chat page's reader of streams.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

const source = await readFile(new URL("../../device/http/page/stream.js", import.meta.url), "utf8");
const { events } = await import(`data:text/javascript,${encodeURIComponent(source)}`);

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
