// What a command says about itself by writing to the file that BERTH_OUTPUT names.

const MAX_KEYS = 64;
const KEY_LENGTH = 128;
const VALUE_LENGTH = 4096;

/** Lines of an output file: what they set, and what is wrong with the others. An empty value unsets. */
export function parseOutput(text: string): { values: Record<string, string>; problems: string[] } {
  const values = new Map<string, string>();
  const problems: string[] = [];
  const lines = text.split("\n");
  const set = (key: string, value: string) => {
    const isNew = !values.has(key);
    if (key.length === 0 || key.length > KEY_LENGTH) problems.push(`a key must have 1 to ${KEY_LENGTH} characters`);
    else if (value.length > VALUE_LENGTH) problems.push(`${key}: a value has at most ${VALUE_LENGTH} characters`);
    else if (value === "") values.delete(key);
    else if (isNew && values.size >= MAX_KEYS) problems.push(`${key}: there are at most ${MAX_KEYS} keys`);
    else values.set(key, value.toWellFormed());
  };
  for (let at = 0; at < lines.length; at++) {
    const line = (lines[at] ?? "").replace(/\r$/, "");
    if (line === "") continue;
    const [, blockKey, mark] = /^([^=<]+)<<(\S+)$/.exec(line) ?? [];
    if (blockKey !== undefined) {
      const end = lines.indexOf(mark ?? "", at + 1);
      if (end < 0) {
        problems.push(`${blockKey}: the line ${mark} that ends it is missing`);
        break;
      }
      set(blockKey, lines.slice(at + 1, end).join("\n"));
      at = end;
      continue;
    }
    const equals = line.indexOf("=");
    if (equals < 0) problems.push("a line is not KEY=VALUE");
    else set(line.slice(0, equals), line.slice(equals + 1));
  }
  return { values: Object.fromEntries(values), problems };
}
