// Patterns come from callers, so both matchers are free of backtracking that grows with the pattern.

type Token = "*" | "?" | { negated: boolean; ranges: [string, string][] } | { literal: string };

/** Reads `[...]` at `start`; undefined if it is not closed, which makes the bracket an ordinary character. */
function bracket(characters: readonly string[], start: number): { token: Token; end: number } | undefined {
  let at = start + 1;
  const negated = characters[at] === "!" || characters[at] === "^";
  if (negated) at++;
  const ranges: [string, string][] = [];
  for (let first = true; at < characters.length; first = false) {
    const low = characters[at] ?? "";
    if (low === "]" && !first) return { token: { negated, ranges }, end: at };
    const high = characters[at + 2];
    const isRange = characters[at + 1] === "-" && high !== undefined && high !== "]";
    ranges.push([low, isRange ? high : low]);
    at += isRange ? 3 : 1;
  }
  return undefined;
}

function tokenize(pattern: string): Token[] {
  const characters = [...pattern];
  const tokens: Token[] = [];
  for (let at = 0; at < characters.length; at++) {
    const character = characters[at] ?? "";
    const set = character === "[" ? bracket(characters, at) : undefined;
    if (set) {
      tokens.push(set.token);
      at = set.end;
    } else if (character === "*") {
      if (tokens.at(-1) !== "*") tokens.push("*");
    } else if (character === "?") tokens.push("?");
    else if (character === "\\" && at + 1 < characters.length) tokens.push({ literal: characters[++at] ?? "" });
    else tokens.push({ literal: character });
  }
  return tokens;
}

function matchesOne(token: Exclude<Token, "*">, character: string): boolean {
  if (token === "?") return true;
  if ("literal" in token) return token.literal === character;
  return token.ranges.some(([low, high]) => low <= character && character <= high) !== token.negated;
}

/** Whether items match a pattern in which "*" stands for any number of them. Only the last "*" is ever tried again. */
function wildcard<Token, Item>(
  pattern: readonly (Token | "*")[],
  items: readonly Item[],
  matches: (token: Token, item: Item) => boolean,
): boolean {
  let [next, star, resume] = [0, -1, 0];
  for (let at = 0; at < items.length; ) {
    const token = pattern[next];
    if (token === "*") {
      star = next++;
      resume = at;
    } else if (token !== undefined && matches(token, items[at] as Item)) {
      next++;
      at++;
    } else if (star >= 0) {
      next = star + 1;
      at = ++resume;
    } else return false;
  }
  while (pattern[next] === "*") next++;
  return next === pattern.length;
}

const SPECIAL = /[*?[\\]/;

type NameMatcher = (name: string) => boolean;

/** A shell glob over one name: `*`, `?`, `[a-z]`, `[!a-z]`, `\x`. A leading dot is matched like any character. */
export function globMatcher(pattern: string): NameMatcher {
  if (!SPECIAL.test(pattern)) return (name) => name === pattern;
  if (pattern.startsWith("*") && !SPECIAL.test(pattern.slice(1))) return (name) => name.endsWith(pattern.slice(1));
  const tokens = tokenize(pattern);
  return (name) => wildcard(tokens, [...name], matchesOne);
}

const anyName: NameMatcher = () => true;

/**
 * A glob over the segments of a path, as in .gitignore: `**` stands for any number of directories, at the end for
 * everything below.
 */
export function pathMatcher(pattern: string): (segments: readonly string[]) => boolean {
  const parts = pattern.split("/").map((part) => (part === "**" ? ("*" as const) : globMatcher(part)));
  if (parts.at(-1) === "*") parts.push(anyName);
  return (segments) => wildcard(parts, segments, (matches, segment) => matches(segment));
}

const isBoundary = (before: string | undefined) => before === undefined || /[/._\- ]/.test(before);

/**
 * Score of a case-insensitive match of the query's characters in order, spaces ignored; undefined if there is none.
 * Higher is better: runs, starts of words, the last path segment and short paths count.
 */
export function fuzzyScorer(query: string): (path: string) => number | undefined {
  const wanted = [...query.toLowerCase().replaceAll(" ", "")];
  return (path) => {
    const characters = [...path.toLowerCase()];
    const lastSegment = characters.lastIndexOf("/") + 1;
    // From the end, so that the last path segment wins over directories.
    let [score, next, previous] = [0, wanted.length - 1, -1];
    for (let at = characters.length - 1; at >= 0 && next >= 0; at--) {
      if (characters[at] !== wanted[next]) continue;
      score += 1;
      if (previous === at + 1) score += 4;
      if (isBoundary(characters[at - 1])) score += 3;
      if (at >= lastSegment) score += 2;
      previous = at;
      next--;
    }
    return next >= 0 ? undefined : score - characters.length / 1000;
  };
}
