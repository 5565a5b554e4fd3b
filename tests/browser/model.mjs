// Draws in node with an exported page's own model, runtime and sampler, from noise that Python wrote.
// Arguments: the page's folder, a file of {x, noises, labels, guidance, steps}. Prints the final x_0 as JSON.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, input] = process.argv.slice(2);
const file = (name) => pathToFileURL(`${folder}/${name}`).href;
const { denoise, guided } = await import(file("sampler.js"));
const ort = await import(file("ort/ort.wasm.min.mjs"));
const model = JSON.parse(readFileSync(`${folder}/model/model.json`));
const { x, noises, labels, guidance, steps } = JSON.parse(readFileSync(input));

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmBinary = readFileSync(`${folder}/ort/ort-wasm-simd-threaded.wasm`);
const session = await ort.InferenceSession.create(readFileSync(`${folder}/model/model.onnx`));
const { channels, height, width, types } = model;

async function network(values, t, rows) {
  const batch = values.length / (channels * height * width);
  const feeds = {
    x: new ort.Tensor("float32", values, [batch, channels, height, width]),
    t: new ort.Tensor("float32", new Float32Array(batch).fill(t), [batch]),
    labels: new ort.Tensor("float32", rows, [batch, types.length]),
  };
  return (await session.run(feeds)).x_0.data;
}

let last;
const options = { sampler: "sde-dpm++", steps, clip: 1, drawNoise: () => Float32Array.from(noises.shift()) };
const guidedNetwork = guided(network, Float32Array.from(labels), guidance);
for await (const { x_0 } of denoise(guidedNetwork, model.alpha_bar, Float32Array.from(x), options)) last = x_0;
process.stdout.write(JSON.stringify([...last]), () => process.exit(0)); // the runtime would keep node alive
