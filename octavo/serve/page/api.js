// The server's API: requests, errors in words, and answers as they stream in.

/** A failure, in words; `status` is HTTP's where the server answered. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** What the server calls its model. `signal` stops the question. */
export async function modelName(key, signal) {
  const response = await ask("v1/models", key, { signal });
  return (await response.json()).data[0].id;
}

/** The chunks of a streamed answer. `signal` stops it. */
export async function* chat(body, key, signal) {
  const response = await ask("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const stream = events(response.body);
  while (true) {
    let next;
    try {
      next = await stream.next();
    } catch (error) {
      throw signal.aborted ? error : new ApiError("The connection broke off.");
    }
    signal.throwIfAborted(); // what had arrived by then is not wanted either
    if (next.done) throw new ApiError("The answer ended too early.");
    if (next.value === "[DONE]") return;
    const chunk = JSON.parse(next.value);
    if (chunk.error) throw new ApiError(chunk.error.message);
    yield chunk;
  }
}

/** The data of each server-sent event in a stream of bytes, wherever it is cut. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder(); // keeps a character that is not whole yet
  let rest = "";
  let data = [];
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return; // what no empty line has ended is not an event
      rest += decoder.decode(value, { stream: true });
      // A carriage return at the very end may be the first half of a line's end.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // already broken off, if it cannot be
  }
}

async function ask(path, key, options = {}) {
  if (!/^[\x21-\x7e]*$/.test(key)) throw new ApiError("No API key has such characters.", 401);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw options.signal?.aborted ? error : new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw new ApiError(await reason(response), response.status);
  return response;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  }
}
