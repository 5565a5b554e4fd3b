// Runs functions of web/ in node for test_web_modules.py: reads lines [task, input] of JSON, and answers each by a line.

import { createInterface } from "node:readline";

import { encodePng, pack, unpack } from "../web/bytes.js";
import { Noise, ln, normals } from "../web/random.js";
import { NoiseBetween, SAMPLERS, addNoise, denoise, guided, slerp, startOfDrawing } from "../web/sampler.js";
import { defaults, fromHash, limits, samplerOf, toHash } from "../web/settings.js";

const floats = (values) => Float32Array.from(values);

/** The optimal network for Gaussian pixels, as tests/gaussian.py has it. */
function gaussian(alphaBar, mean, std) {
  return async (x, t, labels) => {
    const [abar, size] = [alphaBar[t], mean.length];
    return x.map((value, i) => {
      const mu = mean[i % size] * (1 + (labels ? labels[Math.floor(i / size)] : 0));
      const variance = std[i % size] ** 2;
      return mu + (Math.sqrt(abar) * variance * (value - Math.sqrt(abar) * mu)) / (abar * variance + 1 - abar);
    });
  };
}

async function trajectory({ alphaBar, mean, std, worseStd, x, noises, labels, guidance, ...options }) {
  const earlier = worseStd ? gaussian(alphaBar, mean, worseStd) : null;
  const network = guided(gaussian(alphaBar, mean, std), labels && floats(labels), guidance, earlier);
  const drawNoise = () => floats(noises.shift());
  const steps = [];
  for await (const { t, x_t, x_0 } of denoise(network, alphaBar, floats(x), { ...options, drawNoise })) {
    steps.push({ t, x_t: [...x_t], x_0: [...x_0] });
  }
  return steps;
}

const TASKS = {
  trajectory: (inputs) => Promise.all(inputs.map(trajectory)),
  timesteps: ({ sampler, pairs }) => pairs.map(([T, steps]) => SAMPLERS[sampler].timesteps(T, steps)),
  starts: (inputs) => inputs.map(({ strength, steps, T }) => startOfDrawing(strength, steps, T)),
  slerp: ({ a, b, weights }) => weights.map((weight) => [...slerp(floats(a), floats(b), weight)]),
  addNoise: ({ alphaBar, x, noise, t }) => [...addNoise(alphaBar, floats(x), t, floats(noise))],
  normals: ({ seed, stream, count }) => {
    const draw = normals(seed, stream);
    return Array.from({ length: count }, draw);
  },
  ln: (values) => values.map(ln),
  noise: ({ seed, size }) => {
    const noise = new Noise(seed, size);
    return [noise.x_T, noise.next(), noise.next()].map((part) => [...part]);
  },
  between: ({ from, to, weight, size }) => {
    const noise = new NoiseBetween(from, to, weight, size);
    return [noise.x_T, noise.next(), noise.next()].map((part) => [...part]);
  },
  links: ({ model, hashes }) => hashes.map((hash) => {
    const { settings, notes } = fromHash(hash, model);
    const link = toHash(settings, model);
    const again = fromHash(link, model);
    return { settings, notes, link, again: { link: toHash(again.settings, model), notes: again.notes } };
  }),
  defaults: (model) => defaults(model),
  samplers: (models) => models.map((model) => [samplerOf(model), defaults(model).steps, limits("steps", model).max]),
  png: async ({ width, height, rgba, texts }) =>
    Buffer.from(await encodePng(width, height, Uint8ClampedArray.from(rgba), texts)).toString("base64"),
  packed: async (bytes) => {
    const text = await pack(Uint8Array.from(bytes));
    return { text, again: [...(await unpack(text, bytes.length))] };
  },
  unpackErrors: (inputs) => Promise.all(inputs.map(([text, size]) => unpack(text, size).then(() => "", String))),
  bomb: async ({ megabytes, size }) => {
    const text = await pack(new Uint8Array(megabytes * 2 ** 20));
    return { length: text.length, error: await unpack(text, size).then(() => "", String) };
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const [task, argument] = JSON.parse(line);
  process.stdout.write(`${JSON.stringify(await TASKS[task](argument))}\n`);
}
