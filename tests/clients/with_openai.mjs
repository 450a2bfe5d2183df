// OpenAI's client for Node against a running pair, whose addresses and key are in the environment.

import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";

const { EDGEDRAFT_URL, EDGEDRAFT_API_KEY, EDGEDRAFT_DOWN_URL } = process.env;
const QUESTION = [{ role: "user", content: "Name three rivers of Europe." }];

const client = (options = {}) =>
  new OpenAI({ baseURL: EDGEDRAFT_URL, apiKey: EDGEDRAFT_API_KEY, maxRetries: 0, timeout: 120_000, ...options });
const ask = (fields = {}, options = {}) =>
  client(options).chat.completions.create({ model: "sample", messages: QUESTION, max_tokens: 16, ...fields });
const text = (answer) => answer.choices[0].message.content;

test("a stream has the text and usage of the whole answer", async () => {
  const whole = await ask();
  let streamed = "";
  let usage;
  for await (const chunk of await ask({ stream: true, stream_options: { include_usage: true } })) {
    streamed += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(streamed, text(whole));
  assert.equal(usage.total_tokens, whole.usage.total_tokens);
});

test("stop, seed and max_tokens are honoured", async () => {
  const whole = text(await ask());
  const stop = whole.slice(5, 10);
  assert.equal(text(await ask({ stop: [stop] })), whole.split(stop)[0]);
  assert.equal((await ask({ max_tokens: 3 })).usage.completion_tokens, 3);
  const texts = [];
  for (const seed of [5, 5, 6]) texts.push(text(await ask({ temperature: 1, seed })));
  assert.equal(texts[0], texts[1]);
  assert.notEqual(texts[1], texts[2]);
});

test("developer messages and parts are read", async () => {
  const parts = ["Name three ", "rivers of Europe."].map((part) => ({ type: "text", text: part }));
  const answers = [];
  for (const [role, content] of [["developer", parts], ["system", QUESTION[0].content]]) {
    answers.push(text(await ask({ messages: [{ role, content: "Answer briefly." }, { role: "user", content }] })));
  }
  assert.equal(answers[0], answers[1]);
});

test("two conversations take turns", async () => {
  const conversations = ["A", "B"].map((name) => [{ role: "user", content: `Tell me about ${name}.` }]);
  for (let turn = 0; turn < 2; turn++) {
    for (const messages of conversations) {
      const content = text(await ask({ messages }));
      messages.push({ role: "assistant", content }, { role: "user", content: "Go on." });
    }
  }
  const [first, answer] = conversations[0];
  assert.equal(text(await ask({ messages: [first] })), answer.content);
});

test("an error has its class and names the field", async () => {
  const long = [{ role: "user", content: "river ".repeat(9000) }];
  await assert.rejects(ask({ temperature: -1 }), (error) => {
    assert(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  await assert.rejects(ask({ messages: long }), { code: "context_length_exceeded", param: "messages" });
  await assert.rejects(ask({ model: "gpt-4" }), OpenAI.NotFoundError);
  await assert.rejects(ask({}, { apiKey: "sk-wrong" }), OpenAI.AuthenticationError);
  await assert.rejects(ask({}, { baseURL: EDGEDRAFT_DOWN_URL }), OpenAI.InternalServerError);
});

test("a stream that is aborted makes room for the next answer", async () => {
  const expected = text(await ask());
  const stream = await ask({ max_tokens: 4000, stream: true });
  for await (const _ of stream) break;
  stream.controller.abort();
  assert.equal(text(await ask()), expected);
});

test("a full queue is a rate limit error", async () => {
  const controller = new AbortController();
  const requests = Array.from({ length: 20 }, () =>
    client().chat.completions.create(
      { model: "sample", messages: QUESTION, max_tokens: 4000 },
      { signal: controller.signal },
    ),
  );
  const settled = Promise.allSettled(requests);
  await assert.rejects(Promise.all(requests), OpenAI.RateLimitError);
  controller.abort();
  await settled;
  assert.equal((await ask()).usage.completion_tokens, 16);
});
