// The network at work, in a thread of its own so that the page stays alive.
//
// Messages from the page: load (model), draw (job), stop, decode (id, latents).
// Messages to it: progress, preparing, ready; start, step, image, done, stopped; decoded; failed.
// A job has a number, `run`, which comes back with its messages; a new job ends the one before.

import { fromRgb, toPixels } from "./bytes.js";
import { Noise } from "./random.js";
import { NoiseBetween, addNoise, denoise, guided, startOfDrawing } from "./sampler.js";
import { Problem, fetchBytes } from "./download.js";
import { guideOf } from "./settings.js";

const PREVIEW_SHARE = 0.25; // of the time may go into showing latents while they become a creature

let model; // the content of model.json
let ort; // onnxruntime-web
let sessions = {}; // by the name of the file
let current = null; // the run of the job at work

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === "load") await load(data.model);
    else if (data.kind === "draw") await draw(data.job);
    else if (data.kind === "decode") await answerDecode(data);
    else if (data.kind === "stop") current = null;
  } catch (error) {
    const known = error instanceof Problem;
    self.postMessage({ kind: "failed", while: data.kind, run: data.job?.run, id: data.id,
                       message: known ? error.message : explain(error, data.kind) });
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// loading

async function load(description) {
  model = description;
  const report = (received, total) => self.postMessage({ kind: "progress", received, total });
  const names = ["model.onnx"];
  if (model.latent) names.push("decoder.onnx");
  if (guideOf(model) === "earlier") names.push("earlier.onnx");
  const files = await fetchBytes(model, names, report);
  try {
    ort = await import("./ort/ort.wasm.min.mjs");
  } catch (error) {
    throw new Problem("The page’s runtime, ort/ort.wasm.min.mjs, is missing or cannot run in this browser "
                      + `(${error.message}).`);
  }
  ort.env.wasm.numThreads = 1; // more would need headers that static hosts do not send
  ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
  ort.env.wasm.wasmBinary = files.runtime;
  self.postMessage({ kind: "preparing" });
  for (const [name, bytes] of Object.entries(files.model)) sessions[name] = await open(name, bytes);
  self.postMessage({ kind: "ready" });
}

async function open(name, bytes) {
  try {
    return await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  } catch (error) {
    throw new Problem(`The network in model/${name} cannot be started (${firstLine(error)}).`);
  }
}

/** Return the encoder, which is fetched when the first drawing needs it. */
async function encoder() {
  if (!sessions["encoder.onnx"]) {
    const files = await fetchBytes(model, ["encoder.onnx"], () => {}, { withRuntime: false });
    sessions["encoder.onnx"] = await open("encoder.onnx", files.model["encoder.onnx"]);
  }
  return sessions["encoder.onnx"];
}

/** Run a network that has one output, and return its values. */
async function run(name, inputs) {
  const session = sessions[name];
  const feeds = {};
  for (const [key, { values, shape }] of Object.entries(inputs)) {
    feeds[key] = new ort.Tensor("float32", values, shape);
  }
  const outputs = await session.run(feeds);
  return outputs[session.outputNames[0]].data;
}

// ---------------------------------------------------------------------------------------------------------------------
// drawing

async function draw(job) {
  current = job.run;
  const size = model.channels * model.height * model.width;
  const earlier = guideOf(model) === "earlier" ? predict("earlier.onnx") : null;
  const network = guided(predict("model.onnx"), job.labels, job.guidance, earlier);
  const drawn = job.drawing ? await encode(job.drawing) : null;
  const began = performance.now();
  let previews = 0; // milliseconds that went into them

  for (const [index, item] of job.items.entries()) {
    const noise = item.to === undefined ? new Noise(item.seed, size)
      : new NoiseBetween(item.seed, item.to, item.weight, size);
    const { start, steps } = drawn ? startOfDrawing(job.strength, job.steps, model.timesteps)
      : { start: model.timesteps - 1, steps: job.steps };
    const x = drawn ? addNoise(model.alpha_bar, drawn, start, noise.x_T) : noise.x_T;
    self.postMessage({ kind: "start", run: job.run, index, steps, t: start, x_t: frame(x) });

    const options = { sampler: job.sampler, steps, start, clip: clipRange(), drawNoise: () => noise.next() };
    for await (const { step, t, x_t, x_0 } of denoise(network, model.alpha_bar, x, options)) {
      await nextTurn(); // lets a "stop" come in
      if (current !== job.run) return self.postMessage({ kind: "stopped", run: job.run });
      const last = step === steps - 1;
      const message = { kind: last ? "image" : "step", run: job.run, index, step, t, x_t: frame(x_t), x_0: frame(x_0) };
      if (model.latent) {
        const before = performance.now();
        if (last || previews <= PREVIEW_SHARE * (before - began)) {
          message.x_0.pixels = await decode(x_0);
          previews += performance.now() - before;
        }
        if (last) message.x_t.pixels = message.x_0.pixels;
      }
      self.postMessage(message);
    }
  }
  self.postMessage({ kind: "done", run: job.run, seconds: (performance.now() - began) / 1000 });
}

/** Return the function by which a network predicts x_0 of B images, [B C H W], at one timestep. */
function predict(name) {
  return (x, t, labels) => {
    const batch = x.length / (model.channels * model.height * model.width);
    const inputs = {
      x: { values: x, shape: [batch, model.channels, model.height, model.width] },
      t: { values: new Float32Array(batch).fill(t), shape: [batch] },
    };
    if (labels) inputs.labels = { values: labels, shape: [batch, model.types.length] };
    return run(name, inputs);
  };
}

const clipRange = () => (model.clip ? (model.clip_range ?? 1) : 0);

/** What the page keeps of an x_t: its pixels, or for a latent model the latents, which it has decoded when it must. */
function frame(x) {
  return model.latent ? { latents: x, pixels: null } : { pixels: toPixels(x, model.width, model.height) };
}

/** Return x_0 of the drawing, RGB bytes of image_size x image_size. */
async function encode(rgb) {
  const image = fromRgb(rgb);
  if (!model.latent) return image;
  const session = await encoder();
  const shape = [1, 3, model.image_size, model.image_size];
  return run("encoder.onnx", { [session.inputNames[0]]: { values: image, shape } });
}

/** Return the pixels of latents. */
async function decode(latents) {
  const session = sessions["decoder.onnx"];
  const shape = [1, model.channels, model.height, model.width];
  const image = await run("decoder.onnx", { [session.inputNames[0]]: { values: latents, shape } });
  return toPixels(image, model.image_size, model.image_size);
}

async function answerDecode({ id, latents }) {
  self.postMessage({ kind: "decoded", id, pixels: await decode(latents) });
}

const channel = new MessageChannel();
channel.port1.start();

/** Wait until the messages that have come in are handled; a timer would wait for some milliseconds more. */
function nextTurn() {
  return new Promise((resolve) => {
    channel.port1.addEventListener("message", resolve, { once: true });
    channel.port2.postMessage(null);
  });
}

/** Say what an unexpected error means. */
function explain(error, doing) {
  const reason = firstLine(error);
  const memory = /memory|allocat|RangeError/i.test(`${error?.name} ${reason}`);
  if (memory) return `There is not enough memory to ${doing} (${reason}). Close other tabs, or draw fewer at a time.`;
  return `The network stopped with an error (${reason}). Reload the page to try again.`;
}

const firstLine = (error) => String(error?.message ?? error).split("\n")[0].slice(0, 200);
