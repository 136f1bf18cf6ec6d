import { spawn } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { hostname } from "node:os";
import { Code, ConnectError } from "@connectrpc/connect";
import { createBerthClient } from "../client.ts";
import { RefusedStart } from "../domain/errors.ts";
import {
  type Credential,
  credentialsPath,
  findCredential,
  forgetCredential,
  keepCredential,
  serverOf,
} from "./credentials.ts";
import { ExitCode } from "./exit.ts";
import { say, tell } from "./output.ts";
import { readOptions } from "./usage.ts";

const LOGIN_USAGE = "berth login [URL] [--no-browser]";
const LOGOUT_USAGE = "berth logout [URL]";
const TOKEN_USAGE = "berth token [URL]";
const WAIT_MS = 10 * 60_000;
const REQUEST_MS = 30_000;
const DONE_PAGE = "You are signed in on the command line. This page can be closed.\n";

/** The URL among the arguments of a command, and the rest of them. */
function withoutUrl(args: readonly string[]): { url: string | undefined; rest: string[] } {
  const index = args.findIndex((arg) => !arg.startsWith("-"));
  return index < 0 ? { url: undefined, rest: [...args] } : { url: args[index], rest: args.toSpliced(index, 1) };
}

const secret = () => randomBytes(32).toString("base64url");

/** Waits on a port of this machine for the browser to bring the code that belongs to `state`. */
async function waitForBrowser(state: string): Promise<{ port: number; code: Promise<string>; close(): void }> {
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  promise.catch(() => undefined);
  const server = createServer((request, response) => {
    const url = new URL(request.url ?? "", "http://127.0.0.1");
    const code = url.searchParams.get("code");
    const isIt = url.pathname === "/callback" && url.searchParams.get("state") === state && code;
    response.writeHead(isIt ? 200 : 404, { "content-type": "text/plain; charset=utf-8", connection: "close" });
    response.end(isIt ? DONE_PAGE : "This is not what berth login waits for.\n");
    if (isIt) resolve(code);
  });
  server.once("error", reject);
  await new Promise<void>((listening) => server.listen(0, "127.0.0.1", listening));
  const timer = setTimeout(
    () => reject(new RefusedStart("nobody has agreed in the browser within ten minutes")),
    WAIT_MS,
  );
  const close = () => {
    clearTimeout(timer);
    server.close();
  };
  return { port: (server.address() as AddressInfo).port, code: promise, close };
}

/** Shows a page to whoever sits at this machine; without a browser nothing happens. */
function openBrowser(url: string): void {
  const child = spawn("xdg-open", [url], { stdio: "ignore", detached: true });
  child.on("error", () => undefined);
  child.unref();
}

async function swap(server: string, code: string, verifier: string): Promise<Credential> {
  const response = await fetch(`${server}/auth/cli/token`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ code, code_verifier: verifier }),
    signal: AbortSignal.timeout(REQUEST_MS),
  });
  const answer = (await response.json().catch(() => ({}))) as Partial<Credential> & { message?: string };
  const { token, tokenId = "", expiresAt = "", email = "", organizationName = "", message } = answer;
  if (!response.ok || !token) throw new RefusedStart(message ?? `${server} answers with status ${response.status}`);
  return { token, tokenId, expiresAt, email, organizationName };
}

/** Gets a token through the browser and keeps it in the user's configuration file. */
export async function runLogin(args: readonly string[], env: NodeJS.ProcessEnv): Promise<ExitCode> {
  const { url, rest } = withoutUrl(args);
  const values = readOptions(LOGIN_USAGE, rest, { "no-browser": { type: "boolean", default: false } });
  const server = await serverOf(env, url);
  const [state, verifier] = [secret(), secret()];
  const waiting = await waitForBrowser(state);
  try {
    const query = new URLSearchParams({
      ...{ port: String(waiting.port), state },
      code_challenge: createHash("sha256").update(verifier).digest("base64url"),
      machine: hostname()
        .replace(/[^\w.-]/g, "")
        .slice(0, 64),
    });
    const page = `${server}/auth/cli?${query}`;
    tell(`Sign in and agree in a browser on this machine:\n\n  ${page}\n`);
    if (!values["no-browser"]) openBrowser(page);
    const credential = await swap(server, await waiting.code, verifier);
    await keepCredential(env, server, credential);
    const { email, organizationName, expiresAt } = credential;
    tell(`Signed in to ${server} as ${email} in ${organizationName}, until ${expiresAt}.`);
    tell(`The token is in ${credentialsPath(env)}; \`berth token\` prints it.`);
  } finally {
    waiting.close();
  }
  return ExitCode.CLEAN;
}

/** Ends the token on the server; one that has ended already is just as well. */
async function revoke(server: string, { token, tokenId }: Credential): Promise<void> {
  const { users } = createBerthClient({ baseUrl: server, token, defaultTimeoutMs: REQUEST_MS });
  await users.deletePersonalAccessToken({ personalAccessTokenId: tokenId }).catch((error: unknown) => {
    const { code } = ConnectError.from(error);
    if (code !== Code.Unauthenticated && code !== Code.NotFound) throw error;
  });
}

/** Ends and forgets the token of a server. What cannot be ended is forgotten all the same, and said. */
export async function runLogout(args: readonly string[], env: NodeJS.ProcessEnv): Promise<ExitCode> {
  const { url, rest } = withoutUrl(args);
  readOptions(LOGOUT_USAGE, rest, {});
  const server = await serverOf(env, url);
  const credential = await findCredential(env, server);
  if (!credential) {
    tell(`You are not signed in to ${server}.`);
    return ExitCode.CLEAN;
  }
  const failure = await revoke(server, credential).catch((error: unknown) => ConnectError.from(error).rawMessage);
  await forgetCredential(env, server);
  if (failure === undefined) tell(`Signed out of ${server}.`);
  else tell(`The token was removed here, but goes on to work until ${credential.expiresAt}: ${failure}`);
  return failure === undefined ? ExitCode.CLEAN : ExitCode.FAILURE;
}

/** Prints the token of a server, for other programs. */
export async function runToken(args: readonly string[], env: NodeJS.ProcessEnv): Promise<ExitCode> {
  const { url, rest } = withoutUrl(args);
  readOptions(TOKEN_USAGE, rest, {});
  const server = await serverOf(env, url);
  const credential = await findCredential(env, server);
  if (!credential) throw new RefusedStart(`you are not signed in to ${server}: run berth login ${server}`);
  say(credential.token);
  return ExitCode.CLEAN;
}
