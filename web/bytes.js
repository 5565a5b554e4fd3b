// Pictures as bytes: pixels of tensors, PNG files with text inside, and drawings that fit into a link.

/** Return RGBA bytes of an image [3 H W] in [-1, 1]; what is beyond is cut off, and so are channels beyond three. */
export function toPixels(image, width, height) {
  const plane = width * height;
  const pixels = new Uint8ClampedArray(4 * plane).fill(255);
  for (let i = 0; i < plane; i++) {
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = (image[c * plane + i] + 1) * 127.5;
  }
  return pixels;
}

/** Return the image [3 H W] in [-1, 1] of RGB bytes. */
export function fromRgb(rgb) {
  const plane = rgb.length / 3;
  return new Float32Array(rgb.length).map((_, i) => rgb[3 * (i % plane) + Math.floor(i / plane)] / 127.5 - 1);
}

/** Return the bytes of a PNG of RGBA pixels, of which the alpha is left out, with {keyword: text} inside it. */
export async function encodePng(width, height, rgba, texts = {}) {
  const rows = new Uint8Array(height * (1 + 3 * width)); // each begins with its filter, 0: none
  for (let y = 0, to = 0, from = 0; y < height; y++) {
    to += 1;
    for (let x = 0; x < width; x++, from += 4, to += 3) rows.set(rgba.subarray(from, from + 3), to);
  }
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 8); // bits a channel
  header.setUint8(9, 2); // RGB
  return concatenate([
    new Uint8Array([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]),
    chunk("IHDR", new Uint8Array(header.buffer)),
    ...Object.entries(texts).map(([keyword, text]) => chunk("tEXt", latin1(`${keyword}\0${text}`))),
    chunk("IDAT", await transform(rows, new CompressionStream("deflate"))),
    chunk("IEND", new Uint8Array(0)),
  ]);
}

function chunk(kind, data) {
  const content = concatenate([latin1(kind), data]);
  const framed = new DataView(new ArrayBuffer(8));
  framed.setUint32(0, data.length);
  framed.setUint32(4, crc32(content));
  const frame = new Uint8Array(framed.buffer);
  return concatenate([frame.subarray(0, 4), content, frame.subarray(4)]);
}

/** Return the bytes of a text; what Latin-1 does not have, which no JSON needs, is escaped as JSON does. */
function latin1(text) {
  const escaped = text.replace(/[^\0-\xff]/g, (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`);
  return Uint8Array.from(escaped, (letter) => letter.charCodeAt(0));
}

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// drawings in a link

/** Return bytes as text for a link: deflated, then base64 with the letters that a link may have. */
export async function pack(bytes) {
  const packed = await transform(bytes, new CompressionStream("deflate-raw"));
  let text = "";
  for (const byte of packed) text += String.fromCharCode(byte);
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

/** Undo `pack`. Throws an error if the text is damaged, or if it does not hold exactly `size` bytes. */
export async function unpack(text, size) {
  const packed = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0));
  const bytes = await transform(packed, new DecompressionStream("deflate-raw"), size);
  if (bytes.length !== size) throw new RangeError(`${bytes.length} bytes, not ${size}`);
  return bytes;
}

/** Return what a stream makes of some bytes; no more than `most` bytes of it. */
async function transform(bytes, stream, most = Infinity) {
  const reader = new Blob([bytes]).stream().pipeThrough(stream).getReader();
  const parts = [];
  let length = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return concatenate(parts);
    parts.push(value);
    length += value.length;
    if (length > most) {
      await reader.cancel();
      throw new RangeError(`more than ${most} bytes`);
    }
  }
}

function concatenate(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let offset = 0;
  for (const part of parts) {
    whole.set(part, offset);
    offset += part.length;
  }
  return whole;
}
