import { join } from "node:path";
import { runCommand } from "../commands.ts";
import { makeFolder, writeAtomically } from "../files.ts";
import { commandUser } from "../machine.ts";
import type { EnvironmentPaths } from "../paths.ts";
import type { UnixUser } from "../users.ts";

// Images are fetched with the logins of the environment. Its user may write anything into that file, such as the name of a
// program to be run for a login: nothing but the logins themselves is taken over.

const READ_MS = 20_000;
const MAX_BYTES = 1024 * 1024;
const READ = 'exec head -c "$2" -- "$1/.docker/config.json" 2>/dev/null';

const isRecord = (value: unknown): value is Record<string, unknown> => typeof value === "object" && value !== null;

/** The logins of a configuration of an engine; undefined if it has none. */
export function loginsOf(text: string): string | undefined {
  let config: unknown;
  try {
    config = JSON.parse(text);
  } catch {
    return undefined;
  }
  if (!isRecord(config) || !isRecord(config.auths)) return undefined;
  const logins = Object.entries(config.auths).flatMap(([host, login]) => {
    const auth = isRecord(login) ? login.auth : undefined;
    return typeof auth === "string" && /^[A-Za-z0-9+/=]+$/.test(auth) ? [[host, { auth }] as const] : [];
  });
  return logins.length > 0 ? JSON.stringify({ auths: Object.fromEntries(logins) }) : undefined;
}

/** A folder of the runner's with the logins of an environment, for an engine; undefined if it has none. */
export async function loginFolder(paths: EnvironmentPaths, user: UnixUser): Promise<string | undefined> {
  const { stdout } = await runCommand("sh", ["-c", READ, "sh", paths.home, String(MAX_BYTES)], {
    ...{ user: commandUser(user), timeoutMs: READ_MS, maxOutput: MAX_BYTES },
  });
  const logins = loginsOf(stdout);
  if (logins === undefined) return undefined;
  const folder = join(paths.root, "logins");
  makeFolder(folder, 0o700);
  await writeAtomically(join(folder, "config.json"), logins);
  return folder;
}
