// The AI SDK's provider for Anthropic against a gateway.
const assert = require("node:assert/strict");
const { createAnthropic } = require("@ai-sdk/anthropic");
const { generateText, isStepCount, Output, streamText, tool } = require("ai");
const { z } = require("zod");
const { models, run } = require("./checks.cjs");

const anthropic = createAnthropic({ baseURL: `${process.env.URL}/v1`, apiKey: process.env.KEY });
const model = anthropic(models.text), caller = anthropic(models["ai-sdk-anthropic"] ?? "");
const asked = { prompt: "What is the weather in Oslo?", maxRetries: 0, maxOutputTokens: 100 };

async function streamed(options) {
  let failure;
  const result = streamText({ ...asked, ...options, onError: ({ error }) => (failure = error) });
  let said = "", thought = "";
  for await (const part of result.fullStream) {
    if (part.type === "text-delta") said += part.text;
    if (part.type === "reasoning-delta") thought += part.text;
  }
  if (failure) throw failure;
  assert(said && (await result.usage).outputTokens > 0);
  return [said, thought];
}

const checks = {
  async "message"() {
    const { text, finishReason, usage } = await generateText({ ...asked, model });
    assert(text && usage.inputTokens > 0);
    return `${finishReason}: ${text}`;
  },
  async "message, stream"() {
    return (await streamed({ model }))[0];
  },
  async "message, object"() {
    const output = Output.object({ schema: z.object({ city: z.string() }) });
    const providerOptions = { anthropic: { structuredOutputMode: "outputFormat" } };
    const { output: place } = await generateText({ ...asked, model, output, providerOptions });
    assert.equal(typeof place.city, "string");
    return JSON.stringify(place);
  },
  async "unknown model"() {
    const error = await generateText({ ...asked, model: anthropic("no such model") }).catch((error) => error);
    assert.equal(error.statusCode, 404);
    assert.equal(error.data.error.type, "not_found_error");
    return error.message;
  },
};
const toolChecks = {
  async "tools and thoughts, stream"() {
    const cities = [];
    const weather = tool({
      description: "Tells the weather.",
      inputSchema: z.object({ city: z.string() }),
      execute: async ({ city }) => (cities.push(city), "rain"),
    });
    const thinking = { type: "enabled", budgetTokens: 1024 };
    const options = { model: caller, tools: { weather }, stopWhen: isStepCount(3), providerOptions: { anthropic: { thinking } } };
    const [said, thought] = await streamed(options);
    assert(cities.length > 0 && thought);
    return `thought "${thought}", weather of ${cities}: ${said}`;
  },
};

run(models["ai-sdk-anthropic"] ? { ...checks, ...toolChecks } : checks);
