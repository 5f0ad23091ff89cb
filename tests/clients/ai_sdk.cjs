// The AI SDK against a gateway.
const assert = require("node:assert/strict");
const { createOpenAI } = require("@ai-sdk/openai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { embedMany, generateText, isStepCount, Output, streamText, tool } = require("ai");
const { z } = require("zod");
const { models, run } = require("./checks.cjs");

const given = { baseURL: `${process.env.URL}/v1`, apiKey: process.env.KEY };
const responses = createOpenAI(given);
const chats = createOpenAICompatible({ name: "fleet", includeUsage: true, supportsStructuredOutputs: true, ...given });
const prompt = "What is the weather in Oslo?";
const caller = models["ai-sdk"];

async function streamed(model, options = {}) {
  const result = streamText({ model, prompt, maxRetries: 0, ...options, onError: ({ error }) => (failure = error) });
  let failure;
  let said = "";
  for await (const piece of result.textStream) said += piece;
  if (failure) throw failure;
  assert(said);
  assert((await result.usage).outputTokens > 0);
  return said;
}

async function withTools(model, options = {}) {
  const asked = [];
  const weather = tool({
    description: "Tells the weather.",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => (asked.push(city), "rain"),
  });
  const said = await streamed(model, { tools: { weather }, stopWhen: isStepCount(3), ...options });
  assert(asked.length > 0);
  return `weather of ${asked}: ${said}`;
}

async function anObject(model) {
  const output = Output.object({ schema: z.object({ city: z.string() }) });
  const result = await generateText({ model, prompt, maxRetries: 0, output });
  assert.equal(typeof result.output.city, "string");
  return JSON.stringify(result.output);
}

const checks = {
  "responses": async () => (await generateText({ model: responses(models.text), prompt, maxRetries: 0 })).text,
  "responses, stream": () => streamed(responses(models.text)),
  "chat": async () => (await generateText({ model: chats(models.text), prompt, maxRetries: 0 })).text,
  "chat, stream": () => streamed(chats(models.text)),
};
const jsonChecks = {
  "responses, object": () => anObject(responses(models.json)),
  "chat, object": () => anObject(chats(models.json)),
};
const toolChecks = {
  "responses, tools": () => withTools(responses(caller), { providerOptions: { openai: { store: false } } }),
  "responses, tools, told what to do where it relies on storage": async () => {
    const error = await withTools(responses(caller)).catch((error) => error);
    assert(error.message.includes("store: false"), error.message);
    return error.message;
  },
  "chat, tools": () => withTools(chats(caller)),
};

run({ ...checks, ...(models.json ? jsonChecks : {}), ...(caller ? toolChecks : {}) });
