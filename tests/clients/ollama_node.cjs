// Ollama's library for JavaScript against a gateway. Prints a line of JSON for each check.
const assert = require("node:assert/strict");
const { Ollama } = require("ollama");
const { models, run } = require("./checks.cjs");

const text = models["text"], caller = models["ollama-node"];
const ollama = new Ollama({ host: process.env.URL, headers: { Authorization: `Bearer ${process.env.KEY}` } });
const messages = [{ role: "user", content: "Say hello." }];
const weather = { name: "weather", parameters: { type: "object", properties: { city: { type: "string" } } } };

const checks = {
  async "models"() {
    const { models } = await ollama.list();
    assert(models.some((model) => model.name === text));
    const { capabilities } = await ollama.show({ model: text });
    assert(capabilities.includes("completion"));
    return `${models.map((model) => model.name)}; ${text}: ${capabilities}`;
  },
  async "chat"() {
    const reply = await ollama.chat({ model: text, messages, options: { num_predict: 20 } });
    assert(reply.done && reply.message.content && reply.eval_count > 0 && reply.total_duration > 0);
    return `${reply.done_reason}: ${reply.message.content}`;
  },
  async "chat, stream"() {
    const parts = [];
    for await (const part of await ollama.chat({ model: text, messages, stream: true })) parts.push(part);
    assert(parts.length > 2 && parts.at(-1).done && parts.at(-1).eval_duration > 0);
    return parts.map((part) => part.message.content).join("");
  },
  async "chat, stream that is left"() {
    const stream = await ollama.chat({ model: text, messages, stream: true });
    for await (const part of stream) if (part.message.content) break;
    stream.abort();
    return "left after its first token";
  },
  async "generate, stream"() {
    const parts = [];
    for await (const part of await ollama.generate({ model: text, prompt: "Say hello.", stream: true })) parts.push(part);
    return parts.map((part) => part.response).join("");
  },
  async "format"() {
    const format = { type: "object", properties: { city: { type: "string" } } };
    const reply = await ollama.chat({ model: text, messages, format });
    assert.equal(typeof JSON.parse(reply.message.content).city, "string");
    return reply.message.content;
  },
  async "unknown model"() {
    const error = await ollama.chat({ model: "no such model", messages }).catch((error) => error);
    assert.equal(error.status_code, 404);
    return error.message;
  },
};

const toolChecks = {
  async "thinks"() {
    const reply = await ollama.chat({ model: caller, messages, think: true });
    assert(reply.message.thinking && reply.message.content);
    return `thought "${reply.message.thinking}", said "${reply.message.content}"`;
  },
  async "runs tools, stream"() {
    const tools = [{ type: "function", function: weather }];
    const turns = [...messages], called = [];
    for await (const part of await ollama.chat({ model: caller, messages, tools, stream: true }))
      called.push(...(part.message.tool_calls ?? []));
    assert(called.length > 0 && called.every((call) => call.function.arguments.city));
    turns.push({ role: "assistant", content: "", tool_calls: called });
    for (const call of called) turns.push({ role: "tool", tool_name: call.function.name, content: "rain" });
    const reply = await ollama.chat({ model: caller, messages: turns, tools });
    assert(reply.message.content);
    return `weather of ${called.map((call) => call.function.arguments.city)}: ${reply.message.content}`;
  },
};

run(caller ? { ...checks, ...toolChecks } : checks);
