import { request as httpRequest } from "node:http";
import { request as httpsRequest } from "node:https";
import { isIPv6, type LookupFunction } from "node:net";
import { authorities } from "../scm/git.ts";
import type { AdmittedUrl } from "../scm/guard.ts";
import { type CommandOptions, type CommandResult, runCommand } from "./commands.ts";

/** What went wrong, short and fit for people. */
export class ContentError extends Error {}

/** Where git runs, as whom, and for how long. */
export type GitContext = Pick<CommandOptions, "user" | "signal" | "timeoutMs" | "onOutput" | "onStart"> & {
  cwd: string;
  home: string;
  environmentId: string;
  /** Protocols that may be used, submodules included. */
  protocols: readonly string[];
  /** Settings that let git sign in to hosts; none for commands that need not. */
  helpers?: readonly string[];
  /** Hosts that have been checked: connections go to these addresses and no others. */
  pinned: readonly AdmittedUrl[];
};

// Nothing of the host's or the repository's configuration may start a program while content is fetched.
const SETTINGS = [
  "core.hooksPath=/dev/null",
  "core.fsmonitor=false",
  "core.askPass=",
  "credential.helper=",
  "http.followRedirects=false",
  "protocol.ext.allow=never",
  "advice.detachedHead=false",
  "gc.auto=0",
  "maintenance.auto=false",
];

const bracketed = (address: string) => (isIPv6(address) ? `[${address}]` : address);

/** Settings that make git connect to the addresses that were checked, over http. */
export function pins(pinned: readonly AdmittedUrl[]): string[] {
  return pinned
    .filter(({ url }) => /^https?:$/.test(url.protocol))
    .map(({ host, port, addresses }) => `http.curloptResolve=${host}:${port}:${addresses.map(bracketed).join(",")}`);
}

/** Options for ssh without prompts, towards the address that was checked. */
export function sshOptions(pinned: readonly AdmittedUrl[]): string[] {
  const address = pinned.find(({ url }) => url.protocol === "ssh:")?.addresses[0];
  const options = ["BatchMode=yes", "StrictHostKeyChecking=accept-new", "ConnectTimeout=20"];
  if (address) options.push(`HostName=${address}`);
  return options.flatMap((option) => ["-o", option]);
}

/** As `sshOptions` say, and without the host's configuration. */
const sshCommand = (pinned: readonly AdmittedUrl[]) => ["ssh", "-F", "/dev/null", ...sshOptions(pinned)].join(" ");

/**
 * Runs git with its own variables only; a failure is a result, not an exception. With a script for the shell, that
 * script runs git: it gets the whole command as its arguments and `subject` as $0.
 */
export async function git(
  context: GitContext,
  args: readonly string[],
  script?: string,
  subject = "sh",
): Promise<CommandResult> {
  const { cwd, home, environmentId, protocols, pinned, user, signal, timeoutMs, onOutput, onStart } = context;
  const settings = [...SETTINGS, ...(context.helpers ?? []), ...pins(pinned)].flatMap((setting) => ["-c", setting]);
  const command = ["git", ...settings, ...args];
  const [file = "", ...rest] = script === undefined ? command : ["sh", "-c", script, subject, ...command];
  return await runCommand(file, rest, {
    ...{ cwd, timeoutMs, user, signal, onOutput, onStart },
    env: {
      ...authorities(),
      HOME: home,
      BERTH_ENVIRONMENT_ID: environmentId,
      GIT_TERMINAL_PROMPT: "0",
      GIT_ASKPASS: "",
      SSH_ASKPASS: "",
      GIT_CONFIG_NOSYSTEM: "1",
      GIT_CONFIG_GLOBAL: "/dev/null",
      GIT_ALLOW_PROTOCOL: protocols.join(":"),
      GIT_SSH_COMMAND: sshCommand(pinned),
      GIT_CEILING_DIRECTORIES: cwd,
    },
  });
}

const FAILURES: readonly (readonly [RegExp, (target: AdmittedUrl) => string])[] = [
  [/No space left on device|Disk quota exceeded/i, () => "disk full"],
  [
    /could not read (Username|Password)|Authentication failed|terminal prompts disabled|Permission denied \((publickey|password)|returned error: 40[13]|HTTP Basic: Access denied|Host key verification failed/i,
    ({ host }) => `authentication needed for ${host}`,
  ],
  [
    /repository .*not found|does not appear to be a git repository|returned error: 404|does not exist|not valid: is this a git repository/i,
    ({ url }) => `repository not found: ${url.href}`,
  ],
  [/Could not resolve host/i, ({ host }) => `host ${host} does not exist`],
  [/returned error: 30\d/i, ({ host }) => `host ${host} redirects elsewhere`],
  [
    /Failed to connect|Connection (refused|timed out|reset)|Could not connect|unable to access|early EOF|hung up unexpectedly/i,
    ({ host }) => `host ${host} cannot be reached`,
  ],
];

const INFO_REFS = "/info/refs";
const REDIRECT_PROBE_MS = 15_000;

/** Git was told not to follow redirects, and met one. */
export const isRedirect = (stderr: string): boolean => /The requested URL returned error: 30[12378]/.test(stderr);

/**
 * Where a host says that a repository lies now; undefined unless it is another path on the same host and port, since
 * nothing else has been checked.
 */
export async function movedTo({ url, addresses }: AdmittedUrl, signal: AbortSignal): Promise<URL | undefined> {
  const probe = new URL(url);
  probe.pathname = `${probe.pathname.replace(/\/$/, "")}${INFO_REFS}`;
  probe.search = "?service=git-upload-pack";
  const pinned = addresses.map((address) => ({ address, family: isIPv6(address) ? 6 : 4 }));
  const lookup: LookupFunction = (_host, options, done) => {
    const [first] = pinned;
    if (options.all) done(null, pinned);
    else done(null, first?.address ?? "", first?.family);
  };
  const send = probe.protocol === "https:" ? httpsRequest : httpRequest;
  const ends = AbortSignal.any([signal, AbortSignal.timeout(REDIRECT_PROBE_MS)]);
  const location = await new Promise<string | undefined>((resolve) => {
    const request = send(probe, { agent: false, lookup, signal: ends, headers: { "user-agent": "git/berth" } });
    request.once("response", (response) => {
      resolve(response.headers.location);
      response.destroy();
    });
    request.on("error", () => resolve(undefined));
    request.end();
  });
  const next = location === undefined ? undefined : URL.parse(location, probe.href);
  if (next?.origin !== probe.origin || !next.pathname.endsWith(INFO_REFS)) return undefined;
  const moved = new URL(next.origin);
  moved.pathname = next.pathname.slice(0, -INFO_REFS.length);
  return moved;
}

/** The short text for a failed git command. What the remote side wrote does not decide. */
export function failureText(stderr: string, target: AdmittedUrl): string {
  const own = stderr.replace(/^remote: .*$/gm, "");
  const known = FAILURES.find(([pattern]) => pattern.test(own));
  if (known) return known[1](target);
  const line = own.split("\n").find((each) => /^(fatal|error):/.test(each)) ?? "";
  return `git failed${line ? `: ${line.replace(/^(fatal|error): /, "").slice(0, 300)}` : ""}`;
}
