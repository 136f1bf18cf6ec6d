/** Where the string, comment or run of blanks that begins at `start` ends; `start + 1` for any other character. */
function endOfToken(text: string, start: number): number {
  const end = (found: number, length: number) => (found < 0 ? text.length : found + length);
  if (text.startsWith("//", start)) return end(text.indexOf("\n", start), 1);
  if (text.startsWith("/*", start)) return end(text.indexOf("*/", start + 2), 2);
  if (text[start] !== '"') return start + 1;
  let at = start + 1;
  while (at < text.length && text[at] !== '"') at += text[at] === "\\" ? 2 : 1;
  return Math.min(at + 1, text.length);
}

/** Parses JSON with comments and trailing commas, as dev container files use it; time is linear. Throws SyntaxError. */
export function parseJsonc(text: string): unknown {
  const kept: string[] = [];
  let comma = false;
  for (let at = text.startsWith("\uFEFF") ? 1 : 0; at < text.length; ) {
    const next = endOfToken(text, at);
    const token = text.slice(at, next);
    at = next;
    const isComment = token.length > 1 && token[0] === "/";
    if (isComment || /^\s$/.test(token)) {
      kept.push(" ");
      continue;
    }
    // A comma is only kept once something other than a closing bracket follows it.
    if (comma && token !== "}" && token !== "]") kept.push(",");
    comma = token === ",";
    if (!comma) kept.push(token);
  }
  if (comma) kept.push(",");
  return JSON.parse(kept.join(""));
}
