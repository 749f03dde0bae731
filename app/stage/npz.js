/** A NumPy archive made in the page: .npy files in a zip that packs nothing, as numpy.savez writes it. */

const KINDS_OF_NUMBER = { Uint8Array: "|u1", Int32Array: "<i4", Float32Array: "<f4" };

/** `tensors`: [name, {shape, data}]; data is a Uint8Array, an Int32Array or a Float32Array. */
export function npzOf(tensors) {
  return zipped(tensors.map(([name, tensor]) => [`${name}.npy`, npy(tensor)]));
}

function npy({ shape, data }) {
  const sizes = shape.length === 1 ? `${shape[0]},` : shape.join(", ");
  const about = `{'descr': '${KINDS_OF_NUMBER[data.constructor.name]}', 'fortran_order': False, 'shape': (${sizes}), }`;
  const padded = `${about.padEnd(Math.ceil((about.length + 11) / 64) * 64 - 11)}\n`;
  const head = new Uint8Array([0x93, ...letters("NUMPY"), 1, 0, padded.length & 255, padded.length >> 8, ...letters(padded)]);
  return joined([head, new Uint8Array(data.buffer, data.byteOffset, data.byteLength)]);
}

const letters = (text) => [...text].map((letter) => letter.charCodeAt(0));

function joined(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((at, part) => {
    whole.set(part, at);
    return at + part.length;
  }, 0);
  return whole;
}

function zipped(files) {
  const parts = [];
  const listed = [];
  let at = 0;
  for (const [name, data] of files) {
    const raw = new TextEncoder().encode(name);
    // version, flags (names are UTF-8), stored, time, date (1 January 1980), checksum, sizes, lengths of name and more
    const about = [20, 2, 0x800, 2, 0, 2, 0, 2, 33, 2, checksum(data), 4, data.length, 4, data.length, 4, raw.length, 2, 0, 2];
    const head = joined([fields(0x04034b50, 4, 20, 2, ...about.slice(2)), raw]);
    listed.push(joined([fields(0x02014b50, 4, 20, 2, ...about, 0, 2, 0, 2, 0, 2, 0, 4, at, 4), raw]));
    parts.push(head, data);
    at += head.length + data.length;
  }
  const list = joined(listed);
  return joined([...parts, list, fields(0x06054b50, 4, 0, 2, 0, 2, files.length, 2, files.length, 2, list.length, 4, at, 4, 0, 2)]);
}

/** Numbers and their widths in bytes, one after another, the lowest byte first. */
function fields(...given) {
  const bytes = [];
  for (let i = 0; i < given.length; i += 2) {
    for (let byte = 0; byte < given[i + 1]; byte += 1) bytes.push((given[i] >>> (8 * byte)) & 255);
  }
  return new Uint8Array(bytes);
}

/** CRC-32, as zip has it. */
function checksum(data) {
  let sum = 0xffffffff;
  for (const byte of data) sum = (sum >>> 8) ^ CHECKSUMS[(sum ^ byte) & 255];
  return (sum ^ 0xffffffff) >>> 0;
}

const CHECKSUMS = Array.from({ length: 256 }, (_, start) => {
  let sum = start;
  for (let bit = 0; bit < 8; bit += 1) sum = sum & 1 ? (sum >>> 1) ^ 0xedb88320 : sum >>> 1;
  return sum >>> 0;
});
