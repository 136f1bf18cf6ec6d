import { posix } from "node:path";
import { pathMatcher } from "../supervisor/patterns.ts";

// Engines leave it to their clients to leave out what `.dockerignore` names.

const MAX_RULES = 10_000;

/** Whether a path of a build context is left out by the rules of a `.dockerignore`; undefined if they leave out nothing. */
export function dockerIgnore(text: string): ((path: string) => boolean) | undefined {
  const rules = text
    .replace(/^\ufeff/, "")
    .split("\n")
    .map((line) => line.trim())
    .filter((line) => line !== "" && !line.startsWith("#"))
    .slice(0, MAX_RULES)
    .map((line) => {
      const negated = line.startsWith("!");
      const path = posix.normalize(negated ? line.slice(1).trim() : line).replace(/^\/+|\/+$/g, "");
      return { negated, path, matches: pathMatcher(path) };
    })
    .filter(({ path }) => path !== "" && path !== ".");
  if (!rules.some(({ negated }) => !negated)) return undefined;
  return (path) => {
    const segments = path.split("/");
    const prefixes = segments.map((_, at) => segments.slice(0, at + 1));
    const decisive = rules.findLast(({ matches }) => prefixes.some((prefix) => matches(prefix)));
    return decisive !== undefined && !decisive.negated;
  };
}
