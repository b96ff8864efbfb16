// The chat page: one conversation, kept in this page's memory and nowhere else.
// Whatever the model or the server says becomes text, never markup.

import { ApiError, chat, modelName } from "./api.js";

const $ = (id) => document.getElementById(id);
const [log, welcome, prompt, key, tools] = ["log", "welcome", "prompt", "key", "tools"].map($);

let model = null; // the name that requests carry
let messages = []; // of the conversation, as the API takes them; the system prompt is not in it
let running = null; // the AbortController of the answer in the making

/** One answer on the page, and the message that it becomes. */
class Answer {
  constructor() {
    this.element = addTurn("assistant", "octavo", "");
    this.text = this.element.querySelector(".text").appendChild(new Text());
    this.calls = [];
    this.finishReason = null;
    this.usage = null;
    this.started = this.last = performance.now();
    this.first = null; // when the first text came; a call is only seen once it has a name
  }

  get isEmpty() {
    return this.text.data === "" && this.calls.length === 0;
  }

  add(chunk) {
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    this.finishReason = choice.finish_reason ?? this.finishReason;
    const content = choice.delta.content ?? "";
    const calls = choice.delta.tool_calls ?? [];
    if (!content && calls.length === 0) return;
    this.last = performance.now();
    if (content) this.first ??= this.last;
    keepAtEnd(() => {
      this.text.appendData(content);
      for (const call of calls) this.addToCall(call);
    });
  }

  addToCall({ index, id, function: { name, arguments: piece } }) {
    if (!this.calls[index]) {
      const element = copy("call");
      element.querySelector(".name").textContent = name;
      this.element.append(element);
      this.calls[index] = { id, name, arguments: "", element };
    }
    const call = this.calls[index];
    call.arguments += piece ?? "";
    call.element.querySelector(".arguments").textContent = call.arguments;
  }

  /** Put the answer into the conversation, and ask for the results of its calls. */
  finish(note) {
    const message = { role: "assistant", content: this.text.data };
    const isCalling = this.finishReason === "tool_calls"; // a call that was cut off is none
    if (isCalling) {
      message.content = null; // the template has no place for text beside calls
      message.tool_calls = this.calls.map(({ id, name, arguments: text }) => ({
        id, type: "function", function: { name, arguments: text },
      }));
    }
    if (isCalling || message.content) messages.push(message);
    keepAtEnd(() => {
      for (const call of this.calls) {
        call.element.querySelector(".arguments").textContent = pretty(call.arguments);
      }
      this.element.append(make("p", "figures", this.figures(note)));
      if (isCalling) askForResults(this);
    });
  }

  figures(note) {
    const parts = [];
    const { completion_tokens: n, prompt_tokens, prompt_tokens_details: details } = this.usage ?? {};
    if (n) {
      parts.push(`${n} tokens`);
      // The first token waits for the prompt; the speed is that of the others, if they were not all
      // there at once. Browsers' clocks may tell a tenth of a millisecond.
      const seconds = (this.last - (this.first ?? this.started)) / 1000;
      if (n > 1 && seconds > 0.001) parts.push(`${((n - 1) / seconds).toFixed(1)} tokens/s`);
      if (this.first) parts.push(`first after ${((this.first - this.started) / 1000).toFixed(2)} s`);
      parts.push(`${details?.cached_tokens ?? 0} of ${prompt_tokens} prompt tokens cached`);
    }
    if (this.finishReason === "length") parts.push("cut off at the limit of tokens");
    if (note) parts.push(note);
    if (this.isEmpty) parts.push("empty answer");
    return parts.join(" · ");
  }
}

/** Ask for an answer to `messages`. Where none comes, `undo` takes the last turn back. */
async function answer(undo) {
  running = new AbortController();
  const stopped = running.signal;
  showRunning();
  showError("");
  let view = null;
  try {
    const body = request();
    model ??= await modelName(key.value, stopped);
    showModel();
    view = new Answer();
    for await (const chunk of chat({ model, ...body }, key.value, stopped)) view.add(chunk);
    view.finish();
  } catch (error) {
    if (stopped.reason === "new conversation") return;
    if (view && !view.isEmpty) {
      view.finish(stopped.aborted ? "stopped" : "broken off");
    } else {
      view?.element.remove();
      undo();
    }
    if (!stopped.aborted) explain(error);
  } finally {
    if (running?.signal === stopped) {
      running = null;
      showRunning();
    }
  }
}

/** The fields of a request that the settings decide. */
function request() {
  const system = $("system").value.trim();
  const body = { messages: system ? [{ role: "system", content: system }, ...messages] : messages };
  for (const [id, name] of [["temperature", "temperature"], ["max-tokens", "max_tokens"]]) {
    const field = $(id);
    if (!field.checkValidity()) throw new FieldError(field, `${label(field)}: ${field.validationMessage}`);
    if (field.value) body[name] = field.valueAsNumber;
  }
  if (tools.value.trim()) {
    try {
      body.tools = JSON.parse(tools.value);
    } catch (error) {
      throw new FieldError(tools, `Tools: not JSON. ${error.message}`);
    }
    if (!Array.isArray(body.tools)) throw new FieldError(tools, "Tools: a JSON list is needed.");
  }
  return body;
}

class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/** Say what went wrong; where a setting is at fault, go there. */
function explain(error) {
  const needsKey = error.status === 401;
  if (needsKey) {
    showError(key.value ? "The server does not know this API key." : "This server asks for an API key.");
  } else {
    const isKnown = error instanceof ApiError || error instanceof FieldError;
    showError(isKnown ? error.message : `The server’s answer cannot be read: ${error.message}`);
  }
  const field = needsKey ? key : error.field;
  if (!field) return;
  $("settings").open = true;
  field.setAttribute("aria-invalid", "true");
  field.focus();
}

function send() {
  const text = prompt.value;
  if (!text.trim() || running) return;
  prompt.value = "";
  const element = addTurn("user", "You", text);
  ask([{ role: "user", content: text }], () => {
    element.remove();
    prompt.value ||= text;
  });
}

/** Add a turn to the conversation and have it answered. */
function ask(turn, undo) {
  const before = messages;
  messages = [...before, ...turn];
  const open = document.querySelectorAll("form.results :is(fieldset, button):enabled");
  // Results can only follow their calls.
  for (const element of open) element.disabled = true;
  answer(() => {
    messages = before;
    for (const element of open) element.disabled = false;
    undo();
  });
}

/** Fields for what the calls of an answer returned. */
function askForResults({ element, calls }) {
  const form = make("form", "results");
  form.append(...calls.map((call) => call.element));
  form.append(make("button", "", calls.length > 1 ? "Send results" : "Send result"));
  element.querySelector(".figures").before(form);
  const fields = calls.map((call) => call.element.querySelector("textarea"));
  for (const field of fields) field.parentElement.hidden = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    const turn = calls.map(({ id, name }, i) => ({
      role: "tool", tool_call_id: id, name, content: fields[i].value,
    }));
    ask(turn, () => {});
  });
  if (!prompt.value) fields[0].focus();
}

function startAnew() {
  running?.abort("new conversation");
  running = null;
  messages = [];
  log.replaceChildren(welcome);
  showError("");
  showRunning();
  prompt.focus();
}

async function connect() {
  const asked = key.value;
  showError(""); // and not once there is a name: by then it may be about what was sent meanwhile
  try {
    model = await modelName(asked);
    if (document.activeElement === key) prompt.focus();
  } catch (error) {
    if (key.value === asked) explain(error); // or another key is asked about already
  }
  showModel();
}

// What is on the page.

function addTurn(kind, author, text) {
  const element = copy("turn");
  element.className = kind;
  element.querySelector("h2").textContent = author;
  element.querySelector(".text").textContent = text;
  keepAtEnd(() => {
    welcome.remove();
    log.append(element);
  }, kind === "user");
  return element;
}

/** Change the log; a reader who is at its end stays there. */
function keepAtEnd(change, always = false) {
  const wasAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (always || wasAtEnd) log.scrollTop = log.scrollHeight;
}

function showRunning() {
  const isRunning = running !== null;
  const hadFocus = [$("stop"), document.body].includes(document.activeElement);
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  log.setAttribute("aria-busy", String(isRunning)); // read out when it is whole
  if (!isRunning && hadFocus) prompt.focus();
}

function showModel() {
  $("model").textContent = model ?? "";
}

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

function make(tag, className, text = "") {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}

function copy(template) {
  return $(template).content.firstElementChild.cloneNode(true);
}

function label(field) {
  return field.labels[0].textContent;
}

/** JSON on several lines; as it is, where that would change more than spaces. */
function pretty(json) {
  const bare = (text) => text.replace(/\s/g, "");
  try {
    const lines = JSON.stringify(JSON.parse(json), null, 2);
    return bare(lines) === bare(json) ? lines : json;
  } catch {
    return json;
  }
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("fields").addEventListener("submit", (event) => event.preventDefault());
$("stop").addEventListener("click", () => running?.abort("stopped"));
$("new").addEventListener("click", startAnew);
key.addEventListener("change", connect);
$("settings").open = matchMedia("(min-width: 60rem)").matches;
prompt.focus();
connect();
