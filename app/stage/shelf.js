/**
 * Pieces of data as script files (app/pieces.py): loaded when they are asked for, since a page opened from disk may
 * fetch nothing; unpacked, and compared with the hash that the page has of each.
 */
const KINDS_OF_ARRAY = { uint8: Uint8Array, int32: Int32Array, float32: Float32Array };
const SHUFFLED = 64; // numbers of an array from which on its bytes lie sorted by significance

/** `about`: {version, up, files: name -> [path, sha256]}. `get(name)` rejects with a sentence for people. */
export function createShelf(about) {
  const waiting = new Map(); // script element -> what takes its text
  const kept = new Map(); // hash -> promise of its value

  window.leanscopePiece = (version, text) => waiting.get(document.currentScript)?.(version, text);

  const load = (name) =>
    new Promise((resolve, reject) => {
      const [path] = about.files[name];
      const script = document.createElement("script");
      waiting.set(script, (version, text) => {
        if (version === about.version) resolve(text);
        else reject(new Error(`${path} was recorded by Leanscope ${version}, and this page is of ${about.version}: export both together.`));
      });
      script.addEventListener("load", () => {
        waiting.delete(script);
        script.remove();
        reject(new Error(`${path} is damaged. Copy the exported folder again.`)); // no news, if it was taken
      });
      script.addEventListener("error", () => reject(new Error(`${path} is missing. Copy the whole exported folder.`)));
      script.src = `${about.up}${path}`;
      document.head.append(script);
    });

  const open = async (name) => {
    const bytes = bytesOf(await load(name));
    const [path, hash] = about.files[name];
    if (!(await matches(bytes, hash))) throw new Error(`${path} is not as it was exported. Copy the exported folder again.`);
    return unpacked(bytes);
  };

  return {
    async get(name) {
      if (!(name in about.files)) throw new Error("This is not part of the page.");
      const [, hash] = about.files[name];
      if (!kept.has(hash)) {
        kept.set(hash, open(name));
        kept.get(hash).catch(() => kept.delete(hash)); // it may be there the next time
      }
      return kept.get(hash);
    },
  };
}

function bytesOf(text) {
  try {
    return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  } catch {
    return new Uint8Array(0);
  }
}

/** Whether the bytes have this hash; true where the browser can't say, as on a plain http address. */
async function matches(bytes, hash) {
  if (!globalThis.crypto?.subtle) return true;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("") === hash;
}

async function unpacked(bytes) {
  if (typeof DecompressionStream === "undefined") throw new Error("This browser is too old for this page: it can't unpack its data.");
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  return revived(head, buffer, 4 + length);
}

function revived(value, buffer, start) {
  if (Array.isArray(value)) return value.map((inner) => revived(inner, buffer, start));
  if (!value || typeof value !== "object") return value;
  if ("array" in value && "count" in value) return arrayOf(value, buffer, start);
  if ("number" in value && Object.keys(value).length === 1 && typeof value.number === "string") return Number(value.number);
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, revived(inner, buffer, start)]));
}

function arrayOf({ array, at, count }, buffer, start) {
  const Kind = KINDS_OF_ARRAY[array];
  const width = Kind.BYTES_PER_ELEMENT;
  if (width === 1 || count < SHUFFLED) return new Kind(buffer.slice(start + at, start + at + count * width));
  const sorted = new Uint8Array(buffer, start + at, count * width);
  const bytes = new Uint8Array(count * width);
  for (let byte = 0; byte < width; byte += 1) {
    for (let i = 0; i < count; i += 1) bytes[i * width + byte] = sorted[byte * count + i];
  }
  return new Kind(bytes.buffer);
}
