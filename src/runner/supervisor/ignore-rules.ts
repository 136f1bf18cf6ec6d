import { globMatcher, pathMatcher } from "./patterns.ts";

const MAX_RULES = 10_000;
/** Files of rules that are larger say nothing. */
export const MAX_IGNORE_BYTES = 1024 * 1024;

interface Rule {
  /** An exception: what it matches is not ignored. */
  negated: boolean;
  directoriesOnly: boolean;
  matches(segments: readonly string[]): boolean;
}

/** With a slash a pattern starts at the folder of the rules, without one it is a name anywhere below. */
function segmentsMatcher(pattern: string): (segments: readonly string[]) => boolean {
  if (pattern.includes("/")) return pathMatcher(pattern.replace(/^\//, ""));
  const matches = globMatcher(pattern);
  return (segments) => matches(segments.at(-1) ?? "");
}

/** One line of a .gitignore; undefined if it says nothing. */
function parseRule(line: string): Rule | undefined {
  // A space at the end counts if it is escaped.
  let pattern = line.replace(/\r$/, "").replace(/(?<!\\) +$/, "");
  if (pattern === "" || pattern.startsWith("#")) return undefined;
  const negated = pattern.startsWith("!");
  if (negated) pattern = pattern.slice(1);
  const directoriesOnly = pattern.endsWith("/");
  if (directoriesOnly) pattern = pattern.slice(0, -1);
  return { negated, directoriesOnly, matches: segmentsMatcher(pattern) };
}

/** The rules of one file such as a .gitignore. The last one that matches decides. */
export class IgnoreRules {
  readonly #rules: readonly Rule[];

  constructor(text: string) {
    const lines = text.replace(/^\ufeff/, "").split("\n");
    this.#rules = lines.flatMap((line) => parseRule(line) ?? []).slice(0, MAX_RULES);
  }

  /** Whether a path, by its segments from the folder of the rules on, is ignored; undefined if no rule matches it. */
  verdict(segments: readonly string[], isDirectory: boolean): boolean | undefined {
    const rule = this.#rules.findLast((each) => (isDirectory || !each.directoriesOnly) && each.matches(segments));
    return rule && !rule.negated;
  }

  /** Whether a path or a folder that it lies in is ignored. */
  ignores(path: string, isDirectory: boolean): boolean {
    const segments = path.split("/");
    return segments.some((_, at) => this.verdict(segments.slice(0, at + 1), isDirectory || at < segments.length - 1));
  }
}
