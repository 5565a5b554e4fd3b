// What a visitor can choose, its limits, and its place in a link.

import { MAX_SEED } from "./random.js";
import { DEFAULT_SAMPLER, SAMPLERS } from "./sampler.js";

export const MODES = ["noise", "drawing", "morph"]; // what the creatures come from

// Name in the settings -> name in the link, limits, and the words for a sentence.
const NUMBERS = {
  seed: { key: "seed", min: 0, max: MAX_SEED, unit: 1, words: "seed" },
  to: { key: "to", min: 0, max: MAX_SEED, unit: 1, words: "second seed" },
  count: { key: "n", min: 1, max: 16, unit: 1, words: "number of creatures" },
  frames: { key: "frames", min: 2, max: 16, unit: 1, words: "number of pictures" },
  guidance: { key: "guidance", min: 1, max: 10, unit: 0.1, words: "guidance" },
  steps: { key: "steps", min: 1, unit: 1, words: "number of steps" }, // the most: as the sampler and the model have it
  strength: { key: "strength", min: 0.05, max: 1, unit: 0.01, words: "strength" },
};

/** Return {min, max, unit} of a number, for this model. */
export function limits(name, model) {
  const { min, max, unit } = NUMBERS[name];
  return { min, max: max ?? Math.min(SAMPLERS[samplerOf(model)].mostSteps, model.timesteps), unit };
}

/** Return the model's sampler, or another that suits the model where this page does not have it. */
export function samplerOf(model) {
  const suits = (name) => Object.hasOwn(SAMPLERS, name)
    && (model.samplers ? model.samplers.includes(name) : !SAMPLERS[name].tuned);
  return [model.sampler.name, ...(model.samplers ?? [])].find(suits) ?? DEFAULT_SAMPLER;
}

/** Return the settings of a first visit. */
export function defaults(model) {
  const sampler = samplerOf(model);
  const steps = sampler === model.sampler.name ? model.sampler.steps : SAMPLERS[sampler].steps;
  const guidance = canGuide(model) ? model.guidance : 1;
  return { mode: "noise", types: [], seed: 0, to: 1, count: 4, frames: 8, guidance: fit("guidance", guidance, model),
           steps: fit("steps", steps, model), strength: 0.6, drawing: "" };
}

/** Return what guidance goes away from: "earlier", the network after less training; "types", those of any; or null. */
export function guideOf(model) {
  if (model.supports_guidance === false || model.guidance <= 1) return null;
  if (model.guide === "earlier") return "earlier";
  return model.types.length > 0 ? "types" : null;
}

/** Return whether guidance does something for creatures of these types; `types` left out: whether for any. */
export function canGuide(model, types = model.types) {
  const guide = guideOf(model);
  return guide === "earlier" || (guide === "types" && types.length > 0);
}

/** Return the nearest value that is allowed, or null for what is no number. */
export function fit(name, value, model) {
  const number = typeof value === "string" && value.trim() === "" ? NaN : Number(value);
  if (Number.isNaN(number)) return null;
  const { min, max, unit } = limits(name, model);
  const inside = Math.min(max, Math.max(min, number));
  return unit === 1 ? Math.round(inside) : Number(inside.toFixed(2));
}

/** Return the creatures to draw: {name, seed}, and between two seeds also {to, weight}. */
export function itemsOf({ mode, seed, to, count, frames }) {
  return Array.from({ length: mode === "morph" ? frames : count }, (_, i) => {
    if (mode !== "morph") {
      const own = (seed + i) % (MAX_SEED + 1);
      return { name: `seed ${own}`, seed: own };
    }
    const weight = i / (frames - 1);
    const percent = Math.round(100 * weight);
    const name = weight === 0 ? `seed ${seed}` : weight === 1 ? `seed ${to}` : `${percent} % of the way to seed ${to}`;
    return { name, seed, to, weight };
  });
}

/** Return the part of a link after "#": all that makes these creatures. */
export function toHash(settings, model) {
  const link = new URLSearchParams();
  const numbers = settings.mode === "morph" ? ["seed", "to", "frames", "steps"] : ["seed", "count", "steps"];
  if (settings.mode !== "noise") link.set("mode", settings.mode);
  if (settings.types.length) link.set("types", settings.types.join(" "));
  if (canGuide(model, settings.types)) numbers.push("guidance");
  if (settings.mode === "drawing") numbers.push("strength");
  for (const name of numbers) link.set(NUMBERS[name].key, String(settings[name]));
  if (settings.mode === "drawing") link.set("drawing", settings.drawing);
  link.set("model", fingerprint(model));
  return link.toString();
}

/**
 * Return {settings, notes} of the part of a link after "#". What is missing takes its default; what cannot be is
 * replaced by what can, and `notes` says so, a sentence each.
 */
export function fromHash(hash, model) {
  const link = new URLSearchParams(hash.replace(/^#/, ""));
  const settings = defaults(model);
  const notes = [];

  for (const [name, { key, words }] of Object.entries(NUMBERS)) {
    if (!link.has(key)) continue;
    const text = link.get(key);
    const value = fit(name, text, model);
    if (value === null) {
      notes.push(`The link’s ${words}, “${shorten(text)}”, is no number; here it is ${settings[name]}.`);
      continue;
    }
    const { min, max } = limits(name, model);
    if (Number(text) < min || Number(text) > max) {
      notes.push(`The link’s ${words}, ${shorten(text)}, is not between ${min} and ${max}; here it is ${value}.`);
    }
    settings[name] = value;
  }

  const types = [...new Set((link.get("types") ?? "").split(/\s+/).filter(Boolean))];
  const known = types.filter((name) => model.types.includes(name));
  const unknown = types.filter((name) => !model.types.includes(name));
  if (unknown.length) {
    notes.push(`The link asks for ${shorten(list(unknown))}, which this model does not know; it is left out.`);
  }
  settings.types = known.slice(0, model.max_types);
  if (known.length > model.max_types) {
    notes.push(`The link asks for ${known.length} types; here they are ${list(settings.types)}, the first `
               + `${model.max_types}.`);
  }

  const mode = link.get("mode") ?? "noise";
  if (MODES.includes(mode)) settings.mode = mode;
  else notes.push(`The link’s way to draw, “${shorten(mode)}”, is unknown; the creatures come from noise.`);
  if (settings.mode === "drawing") settings.drawing = link.get("drawing") ?? "";
  if (link.has("model") && link.get("model") !== fingerprint(model)) {
    notes.push("The link was made with another model; its creatures looked different there.");
  }
  return { settings, notes };
}

/** Return a short text that differs between models. */
export const fingerprint = (model) => String(model.sha256?.["model.onnx"] ?? model.name).slice(0, 8);

/** Join words: "fire", "fire and flying", "fire, ice and flying". */
export function list(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

const shorten = (text) => (text.length > 40 ? `${text.slice(0, 40)}…` : text);
