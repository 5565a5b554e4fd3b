// Fetching the model and its runtime: with progress, checked, and with a sentence for each way in which it can fail.

/** Something that a visitor can understand; its message is a sentence. */
export class Problem extends Error {}

const RUNTIME = "ort/ort-wasm-simd-threaded.wasm";
const FORMAT = 1; // of model.json

const at = (path) => new URL(`./${path}`, import.meta.url);

/** Return the content of model.json. */
export async function fetchModel() {
  const response = await get("model/model.json", { cache: "no-cache" }); // asks the server whether it is still that
  let model;
  try {
    model = await response.json();
  } catch {
    throw new Problem("The model’s description, model/model.json, is damaged. Export it again.");
  }
  if (model?.format !== FORMAT) {
    throw new Problem(`The model’s description is of format ${model?.format}; this page reads format ${FORMAT}. `
                      + "Export page and model together.");
  }
  if (!isWhole(model)) {
    throw new Problem("The model’s description, model/model.json, is incomplete. Export it again.");
  }
  return model;
}

/** Return whether a description has all that the page reads without asking, each of its kind. */
function isWhole(model) {
  const { types, sampler, timesteps, alpha_bar: alphaBar } = model;
  const counts = [model.image_size, model.channels, model.height, model.width, timesteps, sampler?.steps];
  return counts.every((value) => Number.isInteger(value) && value > 0)
    && [model.name, sampler.name].every((value) => typeof value === "string")
    && Array.isArray(types) && types.every((type) => typeof type === "string")
    && Number.isInteger(model.max_types) && model.max_types >= Math.min(1, types.length)
    && Number.isFinite(model.guidance) && Array.isArray(model.samplers ?? [])
    && Array.isArray(alphaBar) && alphaBar.length === timesteps
    && alphaBar.every((value) => Number.isFinite(value) && value >= 0 && value <= 1);
}

/**
 * Return {model: {name: bytes}, runtime: bytes} of files in model/ and of the runtime, all at once.
 * `report(received, total)` is called with bytes; total is 0 while it is unknown.
 */
export async function fetchBytes(model, names, report, { withRuntime = true } = {}) {
  const paths = names.map((name) => `model/${name}`);
  if (withRuntime) paths.push(RUNTIME);
  const progress = paths.map(() => ({ received: 0, total: 0 }));
  const tell = () => {
    const known = progress.every(({ total }) => total > 0);
    const sum = (key) => progress.reduce((total, part) => total + part[key], 0);
    report(sum("received"), known ? Math.max(sum("total"), sum("received")) : 0);
  };
  const abort = new AbortController();
  const contents = await Promise.all(paths.map((path, i) => {
    // The hash makes another address of another content, so that no cache can give an older one.
    const version = model.sha256?.[names[i]]?.slice(0, 16) ?? "";
    return fetchOne(path, model.bytes?.[names[i]], version, abort.signal, (part) => {
      progress[i] = part;
      tell();
    });
  })).catch((error) => {
    abort.abort(); // without one of them the others are of no use
    throw error;
  });
  await Promise.all(names.map((name, i) => check(name, contents[i], model)));
  return { model: Object.fromEntries(names.map((name, i) => [name, contents[i]])), runtime: contents[names.length] };
}

async function fetchOne(path, size, version, signal, report) {
  const response = await get(path, { signal }, version);
  const packed = response.headers.get("content-encoding"); // then the length is not that of the content
  const total = size ?? (packed ? 0 : Number(response.headers.get("content-length") ?? 0));
  const parts = [];
  let received = 0;
  report({ received, total });
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      received += value.length;
      report({ received, total });
    }
  } catch {
    throw new Problem(`The download of ${path} broke off. Try again when the connection is better.`);
  }
  report({ received, total: total || received });
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function get(path, options = {}, version = "") {
  const address = at(path);
  if (version) address.searchParams.set("v", version);
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new Problem(`${path} could not be fetched. Is the connection, or the server, still there?`);
  }
  if (response.status === 404) {
    throw new Problem(`${path} is missing on this server. “python export.py --to web” writes the whole folder.`);
  }
  if (!response.ok) throw new Problem(`The server did not give ${path} (status ${response.status}).`);
  return response;
}

/** Compare a file with what its description says of it. */
async function check(name, bytes, model) {
  const damaged = new Problem(`The model’s file model/${name} is damaged or not the one that model.json describes. `
                              + "Reload the page; if that does not help, export it again.");
  if (model.bytes?.[name] !== undefined && bytes.length !== model.bytes[name]) throw damaged;
  const expected = model.sha256?.[name];
  if (!expected || !globalThis.crypto?.subtle) return; // browsers have it on https and localhost only
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  if (Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") !== expected) throw damaged;
}
