import { ScmError } from "./errors.ts";

const MAX_REF_LENGTH = 512;
const FORBIDDEN_IN_REFS = /[\p{Cc} ~^:?*[\\]|\.\.|@\{|\/\/|^[-/]|[/.]$|^@$/u;
const FULL_COMMIT = /^(?:[0-9a-f]{40}|[0-9a-f]{64})$/i;
const COMMIT = /^[0-9a-f]{7,40}$/i;

/** Full object id: 40 hex digits, or 64 in SHA-256 repositories. */
export const isFullCommit = (text: string) => FULL_COMMIT.test(text);

/** What an address may name a commit by: 7 to 40 hex digits. */
export const isCommit = (text: string) => COMMIT.test(text);

/** The rules of `git check-ref-format`, and no leading dash: such a name is never taken for an option or a revision. */
export function isSafeRef(name: string): boolean {
  if (name === "" || name.length > MAX_REF_LENGTH || !name.isWellFormed() || FORBIDDEN_IN_REFS.test(name)) return false;
  return name.split("/").every((part) => !part.startsWith(".") && !part.endsWith(".lock"));
}

/** The name itself; throws `invalid_url` unless it is safe to hand to git. */
export function safeRef(name: string): string {
  if (!isSafeRef(name)) throw new ScmError("invalid_url", "not a valid branch or tag name");
  return name;
}
