// The AI SDK with its provider for compatible services against a running pair, whose addresses and key are in the environment.

import assert from "node:assert/strict";
import test from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, streamText } from "ai";

const { EDGEDRAFT_URL, EDGEDRAFT_API_KEY } = process.env;
const provider = createOpenAICompatible({
  name: "edgedraft",
  baseURL: EDGEDRAFT_URL,
  apiKey: EDGEDRAFT_API_KEY,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const settings = { model: provider("sample"), prompt: "Name three rivers of Europe.", temperature: 0, maxRetries: 0 };
const schema = jsonSchema({
  type: "object",
  properties: {
    name: { type: "string", maxLength: 20 },
    rank: { type: "integer", minimum: 1, maximum: 9 },
  },
  required: ["name", "rank"],
  additionalProperties: false,
});

test("a stream has the text of the whole answer", async () => {
  const whole = await generateText({ ...settings, maxOutputTokens: 16 });
  let streamed = "";
  for await (const part of streamText({ ...settings, maxOutputTokens: 16 }).textStream) streamed += part;
  assert.equal(streamed, whole.text);
  assert.equal(whole.usage.outputTokens, 16);
});

test("an object has the structure of a schema", async () => {
  const { object } = await generateObject({ ...settings, schema, maxOutputTokens: 200 });
  assert(object.name.length <= 20 && object.rank >= 1 && object.rank <= 9);
});
