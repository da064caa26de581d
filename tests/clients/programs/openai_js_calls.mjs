// openai for JavaScript: a line of JSON for each call, as tests/stand/client_calls.py prints them.
// node openai_js_calls.mjs ENCODER DECODER, with CLIENT_HOME naming the folder of node_modules.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import assert from "node:assert";

const home = process.env.CLIENT_HOME;
const OpenAI = createRequire(`${home}/package.json`)("openai");
const { version } = JSON.parse(readFileSync(`${home}/node_modules/openai/package.json`));
const [encoder, decoder] = process.argv.slice(2);
const of = (url) => new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused-here", maxRetries: 0 });
const messages = [{ role: "user", content: "a fine film" }];
const asked = { model: "story", messages, max_tokens: 5, temperature: 0 };

const calls = {
  "models.list": async () => {
    const found = [];
    for await (const one of of(encoder).models.list()) found.push(one.id);
    assert(found.includes("mood"));
  },
  "completions.create": async () => {
    const told = await of(decoder).completions.create({
      model: "story", prompt: "a fine film", max_tokens: 4 });
    assert.strictEqual(told.choices.length, 1);
  },
  "chat.completions.create, stream": async () => {
    const whole = await of(decoder).chat.completions.create(asked);
    let text = "";
    const parts = await of(decoder).chat.completions.create({ ...asked, stream: true });
    for await (const part of parts) text += part.choices[0]?.delta?.content ?? "";
    assert.strictEqual(text, whole.choices[0].message.content);
  },
  "chat.completions.stream (helper)": async () => {
    const stream = of(decoder).chat.completions.stream(asked);
    const told = await stream.finalChatCompletion();
    assert.strictEqual(told.choices[0].message.role, "assistant");
  },
  "embeddings.create": async () => {
    const told = await of(encoder).embeddings.create({ model: "vectors", input: ["a", "b"] });
    assert.strictEqual(told.data.length, 2);
    assert(told.data[0].embedding.length > 8);
  },
  "NotFoundError, BadRequestError": async () => {
    await assert.rejects(
      of(decoder).completions.create({ model: "nobody", prompt: "a" }), OpenAI.NotFoundError);
    await assert.rejects(
      of(decoder).completions.create({ model: "story", prompt: "very ".repeat(9000) }),
      (error) => error instanceof OpenAI.BadRequestError
        && error.code === "context_length_exceeded");
  },
};

for (const [call, made] of Object.entries(calls)) {
  let error = null;
  try {
    await made();
  } catch (failed) {
    error = `${failed.name}: ${failed.message}`.slice(0, 600);
  }
  console.log(JSON.stringify({ client: "openai (JavaScript)", version, call, error }));
}
