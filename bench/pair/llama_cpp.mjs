// llama.cpp by node-llama-cpp: answers requests, a JSON object a line, with and without a draft model.
// Arguments: the target's GGUF file, the draft model's, the number of threads, the context length.

import { createInterface } from "node:readline";
import { DraftSequenceTokenPredictor, LlamaLogLevel, getLlama } from "node-llama-cpp";

const [targetPath, draftPath, threads, contextSize] = process.argv.slice(2);
const contextOptions = { threads: Number(threads), contextSize: Number(contextSize) };
const llama = await getLlama({
  gpu: false,
  build: "never",
  maxThreads: Number(threads),
  logLevel: LlamaLogLevel.error,
});
const target = await llama.loadModel({ modelPath: targetPath });
const newSequence = async (model, options) => (await model.createContext(contextOptions)).getSequence(options);
const sequences = { "target alone": await newSequence(target) };
if (draftPath) {
  const draft = await newSequence(await llama.loadModel({ modelPath: draftPath }));
  sequences.draft = await newSequence(target, { tokenPredictor: new DraftSequenceTokenPredictor(draft) });
}

const answer = async ({ case: name, prompt_ids, max_new_tokens }) => {
  const sequence = sequences[name];
  const token_ids = [];
  for await (const token of sequence.evaluate(prompt_ids, { temperature: 0, yieldEogToken: true })) {
    token_ids.push(token);
    if (token_ids.length === max_new_tokens || target.isEogToken(token)) break;
  }
  await sequence.clearHistory();
  return token_ids;
};

console.log("ready");
for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify({ token_ids: await answer(JSON.parse(line)) }));
}
process.exit(0);
