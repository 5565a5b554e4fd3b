// Pictures to keep: a PNG with its settings inside.

import { encodePng } from "./bytes.js";
import { canGuide, samplerOf } from "./settings.js";

const SAVED_SIDE = 256; // pixels that a saved creature has at least

/**
 * Give the visitor pictures as one PNG file, and return its name.
 *
 * pictures: square RGBA pixels, all of one size. inRow: side by side, not in a square.
 * inside: what the file says of itself; see `describe`.
 */
export async function savePng(pictures, inRow, inside) {
  const columns = inRow ? pictures.length : Math.ceil(Math.sqrt(pictures.length));
  const { width, height, rgba, scale } = sheet(pictures, columns);
  const png = await encodePng(width, height, rgba, { PokeDiff: JSON.stringify({ ...inside, scale }) });
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(new Blob([png], { type: "image/png" }));
  const words = [inside.types[0], pictures.length > 1 ? "creatures" : "creature", inside.seeds[0]];
  anchor.download = `${words.join("-").replace(/[^\p{L}\d]+/gu, "-").replace(/^-/, "")}.png`;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 60_000);
  return anchor.download;
}

/** Lay pictures out in rows, enlarged by a whole number, on white. */
function sheet(pictures, columns) {
  const side = Math.sqrt(pictures[0].length / 4);
  const scale = Math.max(1, Math.ceil(SAVED_SIDE / side));
  const cell = side * scale;
  const width = columns * cell;
  const height = Math.ceil(pictures.length / columns) * cell;
  const rgba = new Uint8ClampedArray(4 * width * height).fill(255);
  for (const [i, pixels] of pictures.entries()) {
    const left = (i % columns) * cell;
    const top = Math.floor(i / columns) * cell;
    for (let y = 0; y < cell; y++) {
      for (let x = 0; x < cell; x++) {
        const from = 4 * (Math.floor(y / scale) * side + Math.floor(x / scale));
        rgba.set(pixels.subarray(from, from + 4), 4 * ((top + y) * width + left + x));
      }
    }
  }
  return { width, height, rgba, scale };
}

/** Return what a saved file says of itself; the names are those of generate.py. */
export function describe({ mode, types, guidance, steps, strength, seed, to }, items, model, link) {
  return {
    checkpoint: model.name,
    seeds: items.map((item) => item.seed),
    types: [types.join(" ")],
    sampler: samplerOf(model),
    steps,
    guidance: canGuide(model, types) ? guidance : 1,
    ...(mode === "drawing" ? { init_image: "drawing", strength } : {}),
    ...(mode === "morph" ? { interpolate: [seed, to], weights: items.map((item) => item.weight) } : {}),
    image_size: model.image_size,
    drawn_by: "PokeDiff in a browser",
    link,
  };
}
