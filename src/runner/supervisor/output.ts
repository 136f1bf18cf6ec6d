const HEAD_BYTES = 4 * 1024 * 1024;
const TAIL_BYTES = 4 * 1024 * 1024;

const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
const isContinuation = (byte: number | undefined) => byte !== undefined && (byte & 0xc0) === 0x80;

/** Shortens the end so that it does not fall inside a UTF-8 sequence. */
function wholeEnd(bytes: Uint8Array): Uint8Array {
  let start = bytes.length - 1;
  while (start > bytes.length - 4 && isContinuation(bytes[start])) start--;
  const lead = bytes[start] ?? 0;
  const length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1;
  return start + length > bytes.length ? bytes.subarray(0, start) : bytes;
}

/** Drops what is left of a UTF-8 sequence at the start. */
export function wholeStart(bytes: Uint8Array): Uint8Array {
  let start = 0;
  while (start < 3 && isContinuation(bytes[start])) start++;
  return bytes.subarray(start);
}

/** Keeps the first and last 4 MiB of a stream in at most 8 MiB of memory, however it is cut into chunks. */
export class BoundedOutput {
  #store = Buffer.alloc(0);
  #total = 0;

  write(chunk: Uint8Array): void {
    this.#reserve(Math.min(this.#total + chunk.length, HEAD_BYTES + TAIL_BYTES));
    let rest = chunk;
    while (rest.length > 0) {
      const inHead = this.#total < HEAD_BYTES;
      const position = inHead ? this.#total : HEAD_BYTES + ((this.#total - HEAD_BYTES) % TAIL_BYTES);
      const room = (inHead ? HEAD_BYTES : HEAD_BYTES + TAIL_BYTES) - position;
      const part = rest.subarray(0, room);
      this.#store.set(part, position);
      this.#total += part.length;
      rest = rest.subarray(part.length);
    }
  }

  /** The text with invalid UTF-8 replaced, and a marker line where bytes were left out. */
  text(): string {
    const omitted = this.#total - HEAD_BYTES - TAIL_BYTES;
    if (omitted <= 0) return decoder.decode(this.#store.subarray(0, this.#total));
    const seam = HEAD_BYTES + (omitted % TAIL_BYTES);
    const tail = Buffer.concat([this.#store.subarray(seam), this.#store.subarray(HEAD_BYTES, seam)]);
    const head = wholeEnd(this.#store.subarray(0, HEAD_BYTES));
    return `${decoder.decode(head)}\n[... ${omitted} bytes left out ...]\n${decoder.decode(wholeStart(tail))}`;
  }

  #reserve(bytes: number): void {
    if (bytes <= this.#store.length) return;
    const grown = Buffer.alloc(Math.min(Math.max(bytes, this.#store.length * 2, 4096), HEAD_BYTES + TAIL_BYTES));
    this.#store.copy(grown);
    this.#store = grown;
  }
}
