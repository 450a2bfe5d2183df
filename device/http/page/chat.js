// The conversation: sends it with each message, and shows the answer round by round.

import * as chart from "./chart.js";
import { curlCommand } from "./curl.js";
import { Figures } from "./figures.js";
import * as service from "./service.js";
import * as settings from "./settings.js";
import { Tokens } from "./tokens.js";

const find = (id) => document.getElementById(id);
const [transcript, hint, prompt, send, stop, status] = ["transcript", "hint", "prompt", "send", "stop", "status"].map(find);
const conversation = document.querySelector(".conversation");
const [keyForm, key, copy, curl, copied] = ["key-form", "key", "copy", "curl", "copied"].map(find);

let messages = [];
let running = null;
let vocabSize = NaN;
let afterKey = start;

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (text && !running) ask(text);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("ask").requestSubmit();
});
prompt.addEventListener("input", fit);
stop.addEventListener("click", () => {
  running?.abort();
  prompt.focus();
});
find("new-chat").addEventListener("click", newChat);
find("settings").addEventListener("submit", (event) => event.preventDefault());
copy.addEventListener("click", copyAsCurl);
keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  service.useKey(key.value);
  keyForm.hidden = true;
  prompt.focus();
  afterKey();
});
start();

async function start() {
  try {
    const model = await service.model();
    find("model").textContent = model.id;
    vocabSize = model.edgedraft.vocab_size;
    settings.useDefaults(model.edgedraft);
  } catch (error) {
    if (error instanceof service.KeyNeeded) askForKey(start);
    else fail(error);
  }
}

/** The request for an answer to `text` in this conversation. */
function requestFor(text) {
  const fields = settings.fields();
  return { messages: [...messages, { role: "user", content: text }], stream: true, ...fields };
}

async function ask(text) {
  const request = requestFor(text);
  const before = messages;
  request.edgedraft.rounds = true;
  const question = turn("You", "question");
  question.body.textContent = text;
  const reply = turn("Answer", "answer");
  const tokens = new Tokens(reply.body);
  prompt.value = "";
  fit();
  begin();
  let complete = false;
  try {
    const reason = await receive(request, tokens, reply.caption);
    complete = true;
    announce(`Answer complete (${reason}): ${reply.caption.textContent}`);
  } catch (error) {
    if (error.name === "AbortError") {
      reply.caption.append(reply.caption.textContent ? " · stopped" : "stopped");
      announce("Stopped");
    } else if (error instanceof service.KeyNeeded) askForKey(() => ask(text));
    else fail(error);
  }
  end();
  if (messages !== before) return; // a new chat has begun
  if (complete || tokens.text) messages = [...request.messages, { role: "assistant", content: tokens.text }];
  else {
    question.element.remove();
    reply.element.remove();
    prompt.value ||= text;
    fit();
  }
}

/** Show the chunks of an answer as they arrive; returns why it ended. */
async function receive(request, tokens, caption) {
  const figures = new Figures(vocabSize);
  let reason = "";
  chart.clear();
  figures.show();
  for await (const chunk of service.answer(request, running.signal)) {
    const [choice] = chunk.choices;
    reason = choice.finish_reason ?? reason;
    if (!chunk.edgedraft) {
      tokens.addText(choice.delta.content ?? "");
      continue;
    }
    const round = chunk.edgedraft;
    if (!round.tokens) {
      follow(() => tokens.addUnverified(choice.delta.content ?? ""));
      continue;
    }
    follow(() => tokens.add(round));
    figures.add(round);
    figures.show();
    chart.add(round, request.edgedraft.draft_len);
    caption.textContent = `${figures.tokens} tokens · ${figures.speed.toFixed(1)} tokens/s · mode ${round.mode}`;
  }
  return reason;
}

function begin() {
  running = new AbortController();
  hint.hidden = send.hidden = true;
  stop.hidden = false;
  find("problem")?.remove();
  transcript.ariaBusy = "true";
  announce("Answering");
  prompt.focus();
  conversation.scrollIntoView({ block: "end" });
}

function end() {
  running = null;
  send.hidden = false;
  stop.hidden = true;
  transcript.ariaBusy = "false";
}

function newChat() {
  running?.abort();
  messages = [];
  transcript.replaceChildren(hint);
  hint.hidden = false;
  chart.clear();
  new Figures(vocabSize).show();
  prompt.focus();
}

function turn(title, name) {
  const element = document.createElement("article");
  const [heading, body, caption] = ["h2", "div", "p"].map((tag) => document.createElement(tag));
  element.className = name;
  heading.className = "hidden";
  heading.textContent = title;
  body.className = "body";
  caption.className = "caption";
  element.append(heading, body, caption);
  transcript.append(element);
  return { element, body, caption };
}

function askForKey(then) {
  afterKey = then;
  keyForm.hidden = false;
  key.focus();
  key.select();
}

function fail(error) {
  find("problem")?.remove();
  const line = document.createElement("p");
  line.id = "problem";
  line.className = "problem";
  line.setAttribute("role", "alert");
  line.textContent = error.message;
  transcript.append(line);
}

async function copyAsCurl() {
  const text = prompt.value.trim();
  const last = messages.findLast((message) => message.role === "user");
  const request = text || !last ? requestFor(text) : { ...requestFor(""), messages: messages.slice(0, -1) };
  curl.value = curlCommand(service.ANSWERS, request, service.hasKey());
  curl.hidden = false;
  try {
    await navigator.clipboard.writeText(curl.value);
    copied.textContent = "Copied";
  } catch {
    curl.select();
    copied.textContent = "Select and copy it";
  }
}

/** Change the transcript, and keep its end in view if it was. */
function follow(change) {
  const atEnd = Math.abs(conversation.getBoundingClientRect().bottom - innerHeight) < 40;
  change();
  if (atEnd) conversation.scrollIntoView({ block: "end" });
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function announce(text) {
  status.textContent = text;
}
