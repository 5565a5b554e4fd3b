// The reverse process: from noise to a creature, as reverse_diffusion.py computes it.
//
// A tensor is a Float32Array of one image, all channels after each other. `alphaBar` is the table of the model's noise
// schedule, T numbers. A timestep t is an integer in 0 ... T-1, where 0 is the least noise and -1 is the clean image.
// Nothing here knows of a browser, so that node can run it (tests/test_web_modules.py).

import { Noise, ln } from "./random.js";

/**
 * The samplers by name. `step(alphaBar, x_0, x_t, t, s, previous)` goes from x_t to x_s, s < t, and returns the mean of
 * x_s and the standard deviation of the noise to add; `previous` is {t, x_0} of the step before, or null.
 * `timesteps(T, steps)` are those that it visits. `steps` is the default number of steps, `mostSteps` the largest that
 * the page offers. `tuned`: for models alone whose model.json has it among its `samplers`; these were tuned to it.
 * A model names its sampler in model.json; a new one is an entry here.
 */
export const SAMPLERS = {
  "sde-dpm++": { step: sdeDpmSolverStep, timesteps: trailingTimesteps, steps: 20, mostSteps: 100, tuned: false },
  consistency: { step: consistencyStep, timesteps: consistencyTimesteps, steps: 2, mostSteps: 8, tuned: true },
};
export const DEFAULT_SAMPLER = "sde-dpm++";

/**
 * Yield {step, t, x_t, x_0} after each step of the reverse process; the last x_t is the image.
 *
 * network: (x_t, t) -> promise of the predicted x_0, not clipped; see `guided`.
 * x: where to start, with the noise of timestep `start` (the last, if it is not given).
 * steps: 1 ... start + 1.
 * clip: keep x_0 within plus and minus this number; 0 leaves it as it is.
 * drawNoise: returns the noise of the next step.
 */
export async function* denoise(network, alphaBar, x, { sampler, steps, start, clip, drawNoise }) {
  const timesteps = SAMPLERS[sampler].timesteps((start ?? alphaBar.length - 1) + 1, steps);
  let previous = null;
  for (let i = 0; i < timesteps.length; i++) {
    const t = timesteps[i];
    const s = timesteps[i + 1] ?? -1;

    // Predict the clean image.
    let x_0 = await network(x, t);
    if (clip) x_0 = x_0.map((value) => Math.min(clip, Math.max(-clip, value)));

    // Go to the next timestep. The last step, to the clean image, adds no noise.
    const { mean, std } = SAMPLERS[sampler].step(alphaBar, x_0, x, t, s, previous);
    x = s >= 0 && std > 0 ? combine(1, mean, std, drawNoise()) : mean;
    previous = { t, x_0 };
    yield { step: i, t: s, x_t: x, x_0 };
  }
}

/**
 * Return (x_t, t) -> x_0 with labels and guidance: away from what an earlier network predicts (Karras et al. 2024),
 * else classifier-free (Ho & Salimans 2022).
 *
 * network: (x [B images], t, labels [B rows]) -> promise of x_0 [B images].
 * labels: multi-hot Float32Array [K]; null for a model without types.
 * earlier: such a network, after less training; or null.
 */
export function guided(network, labels, guidance, earlier = null) {
  if (guidance === 1) return (x, t) => network(x, t, labels);
  if (earlier) return async (x, t) => away(await network(x, t, labels), await earlier(x, t, labels), guidance);
  if (!labels?.some((label) => label > 0)) return (x, t) => network(x, t, labels);
  const both = new Float32Array(2 * labels.length);
  both.set(labels);
  return async (x, t) => {
    const twice = new Float32Array(2 * x.length);
    twice.set(x);
    twice.set(x, x.length);
    const output = await network(twice, t, both);
    return away(output.subarray(0, x.length), output.subarray(x.length), guidance);
  };
}

/** Return `better`, taken further away from `worse`. */
const away = (better, worse, guidance) => better.map((value, i) => worse[i] + guidance * (value - worse[i]));

// ---------------------------------------------------------------------------------------------------------------------
// steps

/** SDE-DPM-Solver++ 2M (Lu et al. 2022, section 5): x_0 in the middle of the step, then DDIM with eta 1. */
function sdeDpmSolverStep(alphaBar, x_0, x_t, t, s, previous) {
  if (previous !== null && s >= 0) {
    const [lambdaPrevious, lambdaT, lambdaS] = [previous.t, t, s].map((u) => halfLogSnr(alphaBar[u]));
    const weight = (lambdaS - lambdaT) / 2 / (lambdaT - lambdaPrevious);
    x_0 = combine(1 + weight, x_0, -weight, previous.x_0);
  }
  return ddimStep(alphaBar, x_0, x_t, t, s, 1);
}

/** DDIM (Song et al. 2021, eq. 12 and 16). */
function ddimStep(alphaBar, x_0, x_t, t, s, eta) {
  const abarT = alphaBar[t];
  const abarS = s < 0 ? 1 : alphaBar[s];
  const fresh = ((eta * eta * (1 - abarS)) / (1 - abarT)) * (1 - abarT / abarS); // variance of the new noise
  const kept = Math.sqrt(Math.max(1 - abarS - fresh, 0) / (1 - abarT)); // of the old noise, eps = (x_t - a x_0) / b
  return {
    mean: combine(Math.sqrt(abarS) - kept * Math.sqrt(abarT), x_0, kept, x_t),
    std: Math.sqrt(fresh),
  };
}

/** Multistep consistency sampling (Song et al. 2023, algorithm 1): x_0 is the image, and all noise is put on anew. */
function consistencyStep(alphaBar, x_0, x_t, t, s) {
  const abarS = s < 0 ? 1 : alphaBar[s];
  return { mean: x_0.map((value) => Math.sqrt(abarS) * value), std: Math.sqrt(1 - abarS) };
}

/** lambda = ln(signal / noise); -Infinity for pure noise. */
const halfLogSnr = (abar) => (abar > 0 ? ln(abar / (1 - abar)) / 2 : -Infinity);

/** Return a x + b y, as a new tensor. */
function combine(a, x, b, y) {
  const sum = new Float32Array(x.length);
  for (let i = 0; i < sum.length; i++) sum[i] = a * x[i] + b * y[i];
  return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// where to start

/** Return `steps` falling timesteps, evenly spaced, the first at T - 1 ("trailing", Lin et al. 2024, table 2). */
export function trailingTimesteps(T, steps) {
  checkSteps(T, steps);
  return Array.from({ length: steps }, (_, i) => round(T - i * (T / steps)) - 1);
}

const JUMPS = [1, 0.75, 0.43, 0.2, 0]; // of T, a quarter of the steps apart

/**
 * Return `steps` falling timesteps, the first at T - 1, for jumps: of 1000, 999 430 or 999 750 430 200. Other numbers
 * of steps lie on the same curve, drawn straight between these.
 */
export function consistencyTimesteps(T, steps) {
  checkSteps(T, steps);
  const timesteps = [];
  for (let i = 0; i < steps; i++) {
    const part = Math.floor((4 * i) / steps);
    const fraction = JUMPS[part] + (JUMPS[part + 1] - JUMPS[part]) * ((4 * i) / steps - part);
    const below = i === 0 ? T - 1 : timesteps[i - 1] - 1; // no timestep twice, for any number of steps
    timesteps.push(Math.min(round(fraction * T), below));
  }
  return timesteps.map((t, i) => Math.max(t, steps - 1 - i));
}

function checkSteps(T, steps) {
  if (!(steps >= 1 && steps <= T)) throw new RangeError(`steps must be in 1 ... ${T}, not ${steps}`);
}

/** Return the timestep at which a drawing starts and its number of steps (SDEdit, Meng et al. 2022). */
export function startOfDrawing(strength, steps, T) {
  const start = Math.max(0, round(strength * T) - 1);
  return { start, steps: Math.min(start + 1, Math.max(1, round(strength * steps))) };
}

/** Round to the nearest integer and halves to the even one, as Python and NumPy do. */
function round(x) {
  const floor = Math.floor(x);
  if (x - floor !== 0.5) return Math.round(x);
  return floor % 2 === 0 ? floor : floor + 1;
}

/** Draw from q(x_t | x_0) (Ho et al. 2020, eq. 4). */
export function addNoise(alphaBar, x_0, t, noise) {
  return combine(Math.sqrt(alphaBar[t]), x_0, Math.sqrt(1 - alphaBar[t]), noise);
}

/** Interpolate two noises along the arc between them, which keeps their norm (Shoemake 1985). */
export function slerp(a, b, weight) {
  let [ab, aa, bb] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    ab += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  const angle = Math.acos(Math.min(1, Math.max(-1, ab / Math.sqrt(aa * bb))));
  const sine = Math.sin(angle);
  if (!(sine > 1e-3)) return combine(1 - weight, a, weight, b); // no arc: the same way, or opposite ways
  return combine(Math.sin((1 - weight) * angle) / sine, a, Math.sin(weight * angle) / sine, b);
}

/**
 * The noise between those of two seeds, with the interface of `Noise`.
 *
 * The noise of the steps follows the arc as well, so that with a sampler that adds noise, too, both ends are exactly
 * the creatures of their seeds.
 */
export class NoiseBetween {
  constructor(from, to, weight, size) {
    this.ends = [new Noise(from, size), new Noise(to, size)];
    this.weight = weight;
    this.x_T = slerp(this.ends[0].x_T, this.ends[1].x_T, weight);
  }

  next() {
    const [a, b] = this.ends.map((noise) => noise.next());
    return slerp(a, b, this.weight);
  }
}
