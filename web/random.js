// Standard normal noise from a seed.
//
// A creature depends on its own seed alone, never on what is drawn beside it. Only +, -, *, / and the square root are
// used, which IEEE 754 defines to the last bit, so a seed is the same noise in every browser. Math.log and Math.cos
// would not do: each engine rounds them in its own way. The numbers are not those of PyTorch.

export const MAX_SEED = 2 ** 32 - 1;

/** Return a function that draws standard normal numbers from `seed` (0 ... 2^32 - 1) and the name of a stream. */
export function normals(seed, stream) {
  const uniform = uniforms(seed, stream);
  let spare = null;
  return () => {
    if (spare !== null) {
      const second = spare;
      spare = null;
      return second;
    }
    // Polar method (Marsaglia & Bray 1964): a point in the unit disc gives two independent normal numbers.
    let x, y, s;
    do {
      x = 2 * uniform() - 1;
      y = 2 * uniform() - 1;
      s = x * x + y * y;
    } while (s >= 1 || s === 0);
    const scale = Math.sqrt((-2 * ln(s)) / s);
    spare = y * scale;
    return x * scale;
  };
}

/** Return a function that draws uniform numbers in (0, 1): xoshiro128** (Blackman & Vigna 2021). */
function uniforms(seed, stream) {
  // The four words of the state: a hash of the stream's name, then the seed, mixed once for each word.
  let h = 2166136261;
  for (const letter of stream) h = Math.imul(h ^ letter.charCodeAt(0), 16777619);
  h = mix(h ^ mix(seed >>> 0));
  const s = new Uint32Array(4);
  for (let i = 0; i < 4; i++) {
    h = (h + 0x9e3779b9) >>> 0;
    s[i] = mix(h);
  }
  if (!(s[0] | s[1] | s[2] | s[3])) s[0] = 1; // the one state that it cannot leave

  return () => {
    const result = Math.imul(rotate(Math.imul(s[1], 5), 7), 9) >>> 0;
    const t = s[1] << 9;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate(s[3], 11);
    return (result + 0.5) / 4294967296;
  };
}

const rotate = (word, bits) => (word << bits) | (word >>> (32 - bits));

/** Mix the bits of a 32-bit word, one to one (the finaliser of MurmurHash3, Appleby 2011). */
function mix(h) {
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

const words = new DataView(new ArrayBuffer(8));

/** Return the natural logarithm of x > 0 by arithmetic that is equal everywhere; relative error below 1e-15. */
export function ln(x) {
  // x = m 2^e with m in [1/sqrt(2), sqrt(2)), and ln m = 2 artanh((m - 1) / (m + 1)).
  words.setFloat64(0, x);
  const high = words.getUint32(0);
  words.setUint32(0, (high & 0xfffff) | 0x3ff00000);
  let e = (high >>> 20) - 1023;
  let m = words.getFloat64(0);
  if (m > Math.SQRT2) {
    m /= 2;
    e += 1;
  }
  const s = (m - 1) / (m + 1);
  let series = 0;
  for (let k = 23; k >= 1; k -= 2) series = 1 / k + s * s * series;
  return 2 * s * series + e * Math.LN2;
}

/** The noise that makes one creature: `x_T` first, then the noise of each step. */
export class Noise {
  /** @param seed 0 ... 2^32 - 1; @param size numbers in x_t */
  constructor(seed, size) {
    this.size = size;
    this.x_T = fill(size, normals(seed, "x_T"));
    this.draw = normals(seed, "steps");
  }

  /** Return the noise of the next step, Float32Array [size]. */
  next() {
    return fill(this.size, this.draw);
  }
}

function fill(size, draw) {
  const values = new Float32Array(size);
  for (let i = 0; i < size; i++) values[i] = draw();
  return values;
}
