// Anthropic's SDK for JavaScript against a gateway. Prints a line of JSON for each check.
const assert = require("node:assert/strict");
const Anthropic = require("@anthropic-ai/sdk");
const { betaZodTool } = require("@anthropic-ai/sdk/helpers/beta/zod");
const { zodOutputFormat } = require("@anthropic-ai/sdk/helpers/zod");
const { z } = require("zod");
const { models, run } = require("./checks.cjs");

const text = models["text"], caller = models["anthropic-node"];
const client = new Anthropic({ baseURL: process.env.URL, apiKey: process.env.KEY, maxRetries: 0, timeout: 120_000 });
const messages = [{ role: "user", content: "Say hello." }];
const asked = { model: text, messages, max_tokens: 100 };
const said = (message) => message.content.filter((block) => block.type === "text").map((block) => block.text).join("");

const checks = {
  async "models"() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.display_name);
    assert(ids.includes(text));
    assert.equal((await client.models.retrieve(text)).id, text);
    return ids.join(", ");
  },
  async "message"() {
    const message = await client.messages.create(asked);
    assert(said(message) && message.usage.output_tokens > 0 && message._request_id);
    assert.equal(message.stop_reason, "end_turn");
    return said(message);
  },
  async "message, stream"() {
    const stream = client.messages.stream(asked);
    const heard = [];
    stream.on("text", (piece) => heard.push(piece));
    const message = await stream.finalMessage();
    assert.equal(heard.join(""), said(message));
    assert(heard.length > 1 && message.usage.input_tokens > 0 && message.usage.output_tokens > 0);
    return `${heard.length} pieces: ${said(message)}`;
  },
  async "message, stream of events"() {
    const kinds = [];
    for await (const event of await client.messages.create({ ...asked, stream: true })) kinds.push(event.type);
    assert.equal(kinds[0], "message_start");
    assert.deepEqual(kinds.slice(-3), ["content_block_stop", "message_delta", "message_stop"]);
    return `${kinds.length} events`;
  },
  async "message, stream that is left"() {
    for await (const event of await client.messages.create({ ...asked, stream: true }))
      if (event.type === "content_block_delta") break;
    return "left after its first token";
  },
  async "message, parsed"() {
    const format = zodOutputFormat(z.object({ city: z.string() }));
    const message = await client.messages.parse({ ...asked, output_config: { format } });
    assert.equal(typeof message.parsed_output.city, "string");
    return JSON.stringify(message.parsed_output);
  },
  async "stop sequence"() {
    const [first, second] = said(await client.messages.create(asked)).split(" ").slice(1);
    const message = await client.messages.create({ ...asked, stop_sequences: [`${first} ${second}`] });
    assert(["stop_sequence", "end_turn"].includes(message.stop_reason));
    return `${message.stop_reason}: ${said(message)}`;
  },
  async "count of tokens"() {
    const { input_tokens } = await client.messages.countTokens({ model: text, messages, system: "Be kind." });
    assert(input_tokens > 0);
    return `${input_tokens} tokens`;
  },
  async "beta fields"() {
    const betas = ["context-management-2025-06-27", "interleaved-thinking-2025-05-14"];
    const context_management = { edits: [{ type: "clear_tool_uses_20250919" }] };
    return said(await client.beta.messages.create({ ...asked, betas, context_management }));
  },
  async "unknown model"() {
    const error = await client.messages.create({ ...asked, model: "no such model" }).catch((error) => error);
    assert(error instanceof Anthropic.NotFoundError);
    assert.equal(error.error.error.type, "not_found_error");
    assert.equal(error.requestID, error.error.request_id);
    return error.message;
  },
  async "wrong field"() {
    const error = await client.messages.create({ ...asked, max_tokens: 0 }).catch((error) => error);
    assert(error instanceof Anthropic.BadRequestError);
    return error.message;
  },
};

const toolChecks = {
  async "thinks"() {
    const message = await client.messages.stream({ ...asked, model: caller, thinking: { type: "adaptive" } }).finalMessage();
    assert.deepEqual(message.content.map((block) => block.type), ["thinking", "text"]);
    assert(message.content[0].thinking && message.content[0].signature);
    return `thought "${message.content[0].thinking}", said "${said(message)}"`;
  },
  async "thinks unseen"() {
    const message = await client.messages.create({ ...asked, model: caller, thinking: { type: "disabled" } });
    assert.deepEqual(message.content.map((block) => block.type), ["text"]);
    return said(message);
  },
  async "runs tools"() {
    const cities = [];
    const inputSchema = z.object({ city: z.string() });
    const weather = betaZodTool({ name: "weather", description: "The weather.", inputSchema, run: ({ city }) => (cities.push(city), "rain") });
    const message = await client.beta.messages.toolRunner({ ...asked, model: caller, tools: [weather], stream: false });
    assert(cities.length > 0 && said(message));
    return `weather of ${cities}: ${said(message)}`;
  },
  async "runs tools, stream"() {
    const input_schema = { type: "object", properties: { city: { type: "string" } } };
    const turns = [...messages];
    const options = { ...asked, model: caller, tools: [{ name: "weather", input_schema }], messages: turns };
    const first = await client.messages.stream(options).finalMessage();
    assert.equal(first.stop_reason, "tool_use");
    const uses = first.content.filter((block) => block.type === "tool_use");
    assert(uses.every((use) => use.input.city && use.id.startsWith("toolu_")));
    const results = uses.map((use) => ({ type: "tool_result", tool_use_id: use.id, content: [{ type: "text", text: "rain" }] }));
    turns.push({ role: "assistant", content: first.content }, { role: "user", content: results });
    const second = await client.messages.stream(options).finalMessage();
    assert.equal(second.stop_reason, "end_turn");
    return `${first.content.map((block) => block.type)}: ${said(second)}`;
  },
};

run(caller ? { ...checks, ...toolChecks } : checks);
