import type { EnvironmentPaths } from "../paths.ts";
import type { DeliveredSecret } from "../record.ts";
import { shellQuoted } from "../supervisor/shell.ts";
import { asUser, type Place, valueFile } from "./files.ts";

// Git asks a helper for credentials. This one is configured for one host over https alone, and is a command that prints a
// file: addresses never hold a credential, and a new one is used from the next call on.

/** The command that git runs, with the operation as argument. */
const helperCommand = (file: string) => `!f() { test "$1" = get && cat ${shellQuoted(file)}; }; f`;

const keyOf = (host: string) => `credential.https://${host}.helper`;

/** Content of the file for `user:password`; throws if git could not be told. */
export function credentialFile(value: string): string {
  const at = value.indexOf(":");
  if (at < 1 || /\p{Cc}/u.test(value)) throw new Error("its value is not user:password");
  return `username=${value.slice(0, at)}\npassword=${value.slice(at + 1)}\n`;
}

/** Settings for git commands of the runner itself, which read no configuration file. */
export const gitHelpers = (paths: EnvironmentPaths, delivered: readonly DeliveredSecret[]): string[] =>
  delivered.flatMap(({ id, delivery }) =>
    delivery.kind === "git" ? `${keyOf(delivery.host)}=${helperCommand(valueFile(paths, id))}` : [],
  );

async function configure(place: Place, ...args: string[]): Promise<number> {
  return (await asUser(place, "git", ["config", "--global", ...args])).code;
}

/** Makes git ask for the credential of an entry, and no other helper, for this host. */
export async function addHelper(place: Place, host: string, entryId: string): Promise<void> {
  const key = keyOf(host);
  // An empty value lets go of helpers that were named before, which could keep the credential elsewhere.
  const isReset = (await configure(place, "--replace-all", key, "")) === 0;
  const isAdded =
    isReset && (await configure(place, "--add", key, helperCommand(valueFile(place.paths, entryId)))) === 0;
  if (!isAdded) throw new Error("git could not be configured");
}

export async function removeHelper(place: Place, host: string): Promise<void> {
  await configure(place, "--unset-all", keyOf(host));
}
