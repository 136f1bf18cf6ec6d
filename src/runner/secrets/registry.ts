import { basicCredentials } from "../../domain/secret.ts";
import { asUser, type Place, writeSecretFile } from "./files.ts";

// Container engines read the logins of a user from one file, which may hold more than secrets have put there.

const STAGED = ".registry-logins";
const MAX_BYTES = 1024 * 1024;
const DOCKER_HUB = "https://index.docker.io/v1/";
const HUB_HOSTS: ReadonlySet<string> = new Set(["docker.io", "index.docker.io", "registry-1.docker.io"]);
// Arguments: home, file to move there.
const REPLACE = `set -eu
umask 077
mkdir -p -- "$1/.docker"
cd -P -- "$1/.docker"
case "$(pwd -P)/" in "$1"/*) ;; *) exit 3 ;; esac
mv -f -T -- "$2" ./config.json`;

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);
const keyOf = (host: string) => (HUB_HOSTS.has(host) ? DOCKER_HUB : host);

/** The content of the file with these logins and without those; everything else in it stays. */
export function withLogins(text: string, logins: ReadonlyMap<string, string>, gone: readonly string[]): string {
  const config: unknown = text.trim() ? JSON.parse(text) : {};
  if (!isRecord(config)) throw new Error("is no object");
  const auths = { ...(isRecord(config.auths) ? config.auths : {}) };
  for (const host of gone) delete auths[keyOf(host)];
  for (const [host, credentials] of logins) auths[keyOf(host)] = { auth: Buffer.from(credentials).toString("base64") };
  return `${JSON.stringify({ ...config, auths }, null, 2)}\n`;
}

/** Logs the engine of a user in to registries with `user:password` each, and out of others. */
export async function keepLogins(
  place: Place,
  values: ReadonlyMap<string, string>,
  gone: readonly string[],
): Promise<void> {
  const logins = new Map<string, string>();
  for (const [host, value] of values) {
    const credentials = basicCredentials(value);
    if (!credentials) throw new Error("its value is not user:password");
    logins.set(host, credentials);
  }
  const { home } = place.paths;
  const read = await asUser(place, "sh", [
    "-c",
    `head -c ${MAX_BYTES} -- "$1/.docker/config.json" 2>/dev/null || :`,
    "sh",
    home,
  ]);
  let content: string;
  try {
    content = withLogins(read.stdout, logins, gone);
  } catch {
    // The parser's text would quote the file.
    throw new Error("~/.docker/config.json is not the configuration of a container engine");
  }
  await writeSecretFile(place, STAGED, content);
  const { code } = await asUser(place, "sh", ["-c", REPLACE, "sh", home, `${place.paths.secrets}/${STAGED}`]);
  if (code !== 0) throw new Error("~/.docker/config.json could not be written");
}
