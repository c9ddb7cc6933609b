// A client of the server's API: POST /v1/chat/completions with a streamed answer, and GET /v1/models.

/** What the user is told, as one sentence. `status` is that of HTTP, 0 without an answer. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function call(path, key, options = {}) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...options.headers };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Check that it still runs.");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const { status } = response;
  throw new ApiError(sentence(said?.error) ?? `The server refused with status ${status}.`, status);
}

/** The message of an error, with a capital and a full stop. */
function sentence(error) {
  const text = typeof error?.message === "string" ? error.message.trim() : "";
  if (!text) return null;
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

/** The name of the model that the server has. */
export async function modelName(key) {
  const list = await (await call("v1/models", key)).json();
  return list.data[0].id;
}

/** Asks about a picture, which is a data URL. Calls `onText` with the text so far. Returns the text, and what
 *  the last chunk has: objects, faults, image_size {width, height}, timings and finish_reason. */
export async function ask({ model, picture, prompt, key, signal, onText }) {
  const content = [
    { type: "image_url", image_url: { url: picture } },
    { type: "text", text: prompt },
  ];
  const body = JSON.stringify({ model, messages: [{ role: "user", content }], temperature: 0, stream: true });
  const headers = { "Content-Type": "application/json" };
  const response = await call("v1/chat/completions", key, { method: "POST", headers, body, signal });
  let text = "";
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new ApiError(sentence(chunk.error) ?? "The server gave up.");
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    if (choice.delta?.content) onText((text += choice.delta.content));
    if (choice.finish_reason) {
      const { finish_reason, objects, faults } = choice;
      const { image_size, timings } = chunk;
      return { text, objects, faults, image_size, timings, finish_reason };
    }
  }
  throw new ApiError("The server ended before its answer did. Check that it still runs.");
}

/** The JSON values of a stream of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:") && line.slice(5).trim() !== "[DONE]") yield JSON.parse(line.slice(5));
    }
  }
}
