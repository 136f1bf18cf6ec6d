import { join, posix } from "node:path";
import { ScmError } from "../scm/errors.ts";
import type { AdmittedUrl, Guard } from "../scm/guard.ts";
import { remoteUriProblem } from "../scm/initializer.ts";
import { asUrl } from "./clone-plan.ts";
import { ContentError, failureText, type GitContext, git, isRedirect, movedTo } from "./git.ts";

// A repository names its submodules itself, so each address is checked and pinned like one that a user gave, and git is
// told to use exactly that address.

const MAX_DEPTH = 5;
const MAX_SUBMODULES = 100;

interface Submodule {
  name: string;
  path: string;
  url: string;
}

/** How submodules are fetched. */
export interface SubmoduleOptions {
  guard: Guard;
  /** Git in a folder, towards hosts that were checked. */
  contextFor(folder: string, pinned: readonly AdmittedUrl[]): GitContext;
  write(line: string): void;
  signal: AbortSignal;
}

/** What `.gitmodules` says; entries that are incomplete or lead out of the repository are left out. */
async function listed(context: GitContext): Promise<Submodule[]> {
  const pattern = "^submodule\\..*\\.(path|url)$";
  const { stdout } = await git(context, ["config", "--file", ".gitmodules", "--null", "--get-regexp", pattern]);
  const found = new Map<string, Partial<Submodule>>();
  for (const entry of stdout.split("\0")) {
    const [, name, key, value] = /^submodule\.([^\n]*)\.(path|url)\n([^\n]*)$/s.exec(entry) ?? [];
    if (name && key && value) found.set(name, { ...found.get(name), [key]: value });
  }
  return [...found].flatMap(([name, { path = "", url = "" }]) => {
    const normal = posix.normalize(path);
    const isInside = path !== "" && !/^(\.\.?)?(\/|$)/.test(normal) && !normal.startsWith("-");
    return isInside && url !== "" ? [{ name, path: normal, url }] : [];
  });
}

async function admit({ guard, signal }: SubmoduleOptions, url: string): Promise<AdmittedUrl> {
  const problem = remoteUriProblem(url, guard.schemes);
  if (problem) throw new ContentError(`its address ${problem}`);
  try {
    return await guard.admit(asUrl(url), { signal });
  } catch (error) {
    throw error instanceof ScmError ? new ContentError(error.message) : error;
  }
}

async function fetchOne(
  options: SubmoduleOptions,
  folder: string,
  origin: string,
  submodule: Submodule,
): Promise<string> {
  const { name, path } = submodule;
  const isRelative = /^\.\.?\//.test(submodule.url);
  let url = isRelative ? (URL.parse(submodule.url, `${asUrl(origin)}/`)?.href ?? "") : submodule.url;
  let admitted = await admit(options, url);
  const run = (...args: string[]) => git(options.contextFor(folder, [admitted]), args);
  for (let isRetry = false; ; isRetry = true) {
    await run("submodule", "--quiet", "init", "--", path);
    await run("config", "--", `submodule.${name}.url`, url);
    options.write(`Submodule ${path} from ${admitted.url.href}`);
    const { code, stderr } = await run("submodule", "--quiet", "update", "--", path);
    if (code === 0) return url;
    const moved = !isRetry && isRedirect(stderr) ? await movedTo(admitted, options.signal) : undefined;
    if (!moved) throw new ContentError(failureText(stderr, admitted));
    admitted = { ...admitted, url: moved };
    url = moved.href;
  }
}

/**
 * Fetches the submodules of a checkout, and theirs, five levels deep and 100 in all; returns a warning for each one
 * that cannot be had. `origin` is the address that relative ones count from.
 */
export async function fetchSubmodules(options: SubmoduleOptions, folder: string, origin: string): Promise<string[]> {
  const warnings: string[] = [];
  let left = MAX_SUBMODULES;
  const visit = async (at: string, from: string, shown: string, depth: number): Promise<void> => {
    for (const submodule of await listed(options.contextFor(at, []))) {
      const path = posix.join(shown, submodule.path);
      if (depth > MAX_DEPTH || left-- <= 0) {
        warnings.push(`submodule ${path} was left out: there are too many`);
        return;
      }
      try {
        const url = await fetchOne(options, at, from, submodule);
        await visit(join(at, submodule.path), url, path, depth + 1);
      } catch (error) {
        if (!(error instanceof ContentError)) throw error;
        warnings.push(`submodule ${path} could not be fetched: ${error.message}`);
      }
    }
  };
  await visit(folder, origin, "", 1);
  return warnings;
}
