// openai for Node and the AI SDK: `node node_cases.mjs URL` prints {client: {case: "ok" or the reason}} as JSON.

import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const url = process.argv[2];
const MODEL = "demo";
const LIMIT = 200;
const TEXT = "北京的天气怎么样？";
const messages = [{ role: "user", content: TEXT }];
const Weather = z.object({ city: z.enum(["北京", "上海"]), rain: z.boolean() });
const openai = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const compatible = createOpenAICompatible({ name: "belle", baseURL: url, supportsStructuredOutputs: true });
const asked = { model: compatible(MODEL), prompt: TEXT, maxOutputTokens: LIMIT, maxRetries: 0 };
const weather = tool({ description: "天气", inputSchema: Weather, execute: async () => "晴" });

const CASES = {
  openai: {
    async chat() {
      const found = await openai.chat.completions.create({ model: MODEL, messages, max_completion_tokens: 8 });
      assert(found.choices[0].message.content);
    },
    async stream() {
      let text = "";
      const stream = await openai.chat.completions.create({ model: MODEL, messages, max_tokens: 8, stream: true });
      for await (const piece of stream) text += piece.choices[0]?.delta?.content ?? "";
      assert(text);
    },
    async parse() {
      const found = await openai.chat.completions.parse({
        model: MODEL, messages, max_tokens: LIMIT, response_format: zodResponseFormat(Weather, "weather"),
      });
      Weather.parse(found.choices[0].message.parsed);
    },
    async tools() {
      const found = await openai.chat.completions.parse({
        model: MODEL, messages, max_tokens: LIMIT, tool_choice: "required",
        tools: [zodFunction({ name: "weather", parameters: Weather })],
      });
      Weather.parse(found.choices[0].message.tool_calls[0].function.parsed_arguments);
    },
    async stream_of_tools() {
      const runner = openai.chat.completions.stream({
        model: MODEL, messages, max_tokens: LIMIT, tool_choice: { type: "function", function: { name: "weather" } },
        tools: [zodFunction({ name: "weather", parameters: Weather })],
      });
      const found = (await runner.finalChatCompletion()).choices[0];
      assert.equal(found.finish_reason, "tool_calls");
      Weather.parse(JSON.parse(found.message.tool_calls[0].function.arguments));
    },
  },
  "ai-sdk": {
    async text() {
      assert((await generateText({ ...asked, maxOutputTokens: 8 })).text);
    },
    async generate_object() {
      Weather.parse((await generateObject({ ...asked, schema: Weather })).object);
    },
    async output_object() {
      Weather.parse((await generateText({ ...asked, output: Output.object({ schema: Weather }) })).output);
    },
    async tools() {
      const found = await generateText({ ...asked, tools: { weather }, toolChoice: "required" });
      Weather.parse(found.toolCalls[0].input);
    },
    async stream_of_tools() {
      const found = streamText({ ...asked, tools: { weather }, toolChoice: { type: "tool", toolName: "weather" } });
      Weather.parse((await found.toolCalls)[0].input);
    },
  },
};

const outcomes = {};
for (const [client, cases] of Object.entries(CASES)) {
  outcomes[client] = {};
  for (const [name, run] of Object.entries(cases)) {
    outcomes[client][name] = await run().then(() => "ok", (error) => String(error.stack ?? error).slice(0, 1500));
  }
}
console.log(JSON.stringify(outcomes));
