// OpenAI's SDK for JavaScript against a gateway. Prints a line of JSON for each check.
const assert = require("node:assert/strict");
const OpenAI = require("openai");
const { zodTextFormat } = require("openai/helpers/zod");
const { z } = require("zod");
const { models, run } = require("./checks.cjs");

const text = models["text"], caller = models["openai-node"];
const client = new OpenAI({ baseURL: `${process.env.URL}/v1`, apiKey: process.env.KEY, maxRetries: 0, timeout: 120_000 });
const messages = [{ role: "user", content: "Say hello." }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };

const checks = {
  async "models"() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert(ids.includes(text));
    assert.equal((await client.models.retrieve(text)).id, text);
    return ids.join(", ");
  },
  async "chat"() {
    const completion = await client.chat.completions.create({ model: text, messages, max_tokens: 20 });
    assert(completion.choices[0].message.content);
    assert(completion._request_id);
    assert(completion.usage.completion_tokens > 0);
    return completion.choices[0].message.content;
  },
  async "chat, stream"() {
    const options = { model: text, messages, max_tokens: 20, stream_options: { include_usage: true } };
    const stream = client.chat.completions.stream(options);
    let said = "";
    for await (const chunk of stream) said += chunk.choices[0]?.delta?.content ?? "";
    assert.equal(said, await stream.finalContent());
    assert((await stream.totalUsage()).completion_tokens > 0);
    return said;
  },
  async "chat, stream that is left"() {
    const stream = await client.chat.completions.create({ model: text, messages, stream: true });
    for await (const chunk of stream) if (chunk.choices[0]?.delta?.content) break;
    return "left after its first token";
  },
  async "responses"() {
    const response = await client.responses.create({ model: text, input: "Say hello.", max_output_tokens: 20 });
    assert(response.output_text);
    return `${response.status}: ${response.output_text}`;
  },
  async "responses, stream"() {
    const stream = client.responses.stream({ model: text, input: "Say hello." });
    const kinds = new Set();
    let said = "";
    for await (const event of stream) {
      kinds.add(event.type);
      if (event.type === "response.output_text.delta") said += event.delta;
    }
    const response = await stream.finalResponse();
    assert.equal(said, response.output_text);
    assert(kinds.has("response.content_part.done") && kinds.has("response.output_item.done"));
    return `${kinds.size} kinds of events: ${said}`;
  },
  async "completions"() {
    const completion = await client.completions.create({ model: text, prompt: "Say hello.", max_tokens: 20 });
    assert(completion.choices[0].text);
    return completion.choices[0].text;
  },
  async "unknown model"() {
    const error = await client.responses.create({ model: "no such model", input: "Hi" }).catch((error) => error);
    assert(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    return error.message;
  },
};

const jsonChecks = {
  async "responses, parsed"() {
    const format = zodTextFormat(z.object({ city: z.string() }), "place");
    const response = await client.responses.parse({ model: models.json, input: "Where is it?", text: { format } });
    assert.equal(typeof response.output_parsed.city, "string");
    return JSON.stringify(response.output_parsed);
  },
};

const toolChecks = {
  async "chat, runs tools"() {
    const asked = [];
    const weather = { name: "weather", parameters, parse: JSON.parse, function: ({ city }) => (asked.push(city), "rain") };
    const tools = [{ type: "function", function: weather }];
    const runner = client.chat.completions.runTools({ model: caller, messages, tools, stream: true });
    const said = await runner.finalContent();
    assert(asked.length > 0 && said);
    return `weather of ${asked}: ${said}`;
  },
  async "responses, runs tools"() {
    const tools = [{ type: "function", name: "weather", parameters, strict: false }];
    const input = [{ role: "user", content: "What is the weather in Oslo?" }];
    const first = await client.responses.stream({ model: caller, input, tools }).finalResponse();
    const calls = first.output.filter((item) => item.type === "function_call");
    assert(calls.length > 0 && calls.every((call) => JSON.parse(call.arguments).city));
    input.push(...first.output);
    for (const { call_id } of calls) input.push({ type: "function_call_output", call_id, output: "rain" });
    const second = await client.responses.create({ model: caller, input, tools });
    assert(second.output_text);
    return `${first.output.map((item) => item.type)}: ${second.output_text}`;
  },
};

run({ ...checks, ...(models.json ? jsonChecks : {}), ...(caller ? toolChecks : {}) });
