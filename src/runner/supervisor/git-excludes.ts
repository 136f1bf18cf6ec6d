import { realpathSync } from "node:fs";
import { join, resolve } from "node:path";
import { readSmallFile } from "./config.ts";
import { gitOutput } from "./git-command.ts";
import { gitDirectories } from "./git-state.ts";
import { IgnoreRules, MAX_IGNORE_BYTES } from "./ignore-rules.ts";

const MAX_VALUE_BYTES = 4096;
const TIMEOUT_MS = 2_000;

/** Unlike a .gitignore these files may be links, as dotfiles often are. Undefined where there is no usable file. */
function rulesIn(path: string): IgnoreRules | undefined {
  try {
    return new IgnoreRules(readSmallFile(realpathSync(path), MAX_IGNORE_BYTES));
  } catch {
    return undefined;
  }
}

/** The file of the user's own rules: what `core.excludesFile` names, or where git looks without it. */
async function userFile(directory: string, env: Record<string, string>): Promise<string> {
  const options = { directory, env, timeoutMs: TIMEOUT_MS };
  const args = ["config", "--type=path", "-z", "--get", "core.excludesFile"];
  const named = await gitOutput(options, args, MAX_VALUE_BYTES, "core.excludesFile").catch(() => undefined);
  if (named?.code === 0) return resolve(directory, named.output.toString().replace(/\0$/, ""));
  return join(env.XDG_CONFIG_HOME || join(env.HOME ?? "/", ".config"), "git", "ignore");
}

/** Rules of a checkout beside those of its .gitignore files, which come before them: the repository's, then the user's. */
export async function gitExcludes(checkout: string, env: Record<string, string>): Promise<IgnoreRules[]> {
  const directories = gitDirectories(checkout);
  if (!directories) return [];
  const files = [join(directories.common, "info", "exclude"), await userFile(checkout, env)];
  return files.flatMap((path) => rulesIn(path) ?? []);
}
