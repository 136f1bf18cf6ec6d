import type { ContainerUser } from "../containers/engine.ts";

const BLOCK = 512;
const SHORT = 100;
const LONG_LINK = "K";
const LONG_NAME = "L";
const SYMBOLIC_LINK = "2";

const octal = (value: number, width: number) => `${value.toString(8).padStart(width - 1, "0")}\0`;

function header(type: string, name: string, size: number, link: string, { uid, gid }: ContainerUser): Buffer {
  const block = Buffer.alloc(BLOCK);
  block.write(name, 0, SHORT);
  const numbers = [octal(0o777, 8), octal(uid, 8), octal(gid, 8), octal(size, 12), octal(0, 12)].join("");
  block.write(numbers, SHORT);
  // The sum counts its own field as blanks.
  block.write(" ".repeat(8), 148);
  block.write(type, 156);
  block.write(link, 157, SHORT);
  block.write("ustar  \0", 257);
  const sum = block.reduce((total, byte) => total + byte, 0);
  block.write(`${octal(sum, 7)} `, 148);
  return block;
}

/** A name that has no room in a header, ahead of it. */
function long(type: string, text: string): Buffer[] {
  const bytes = Buffer.from(`${text}\0`);
  if (bytes.length <= SHORT) return [];
  const padding = Buffer.alloc((BLOCK - (bytes.length % BLOCK)) % BLOCK);
  return [header(type, "././@LongLink", bytes.length, "", { uid: 0, gid: 0 }), bytes, padding];
}

/** A tar archive of one symbolic link, with paths as long as need be. */
export const linkArchive = (path: string, target: string, owner: ContainerUser): Buffer =>
  Buffer.concat([
    ...[...long(LONG_LINK, target), ...long(LONG_NAME, path)],
    header(SYMBOLIC_LINK, path, 0, target, owner),
    Buffer.alloc(2 * BLOCK),
  ]);
