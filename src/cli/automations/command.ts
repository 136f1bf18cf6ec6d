import type { ParseArgsConfig } from "node:util";
import { Code, type ConnectError } from "@connectrpc/connect";
import { type BerthClient, createBerthClient } from "../../client.ts";
import { findCredential, serverOf } from "../credentials.ts";
import { type ExitCode, Failure } from "../exit.ts";
import { printable, type Terminal } from "../output.ts";
import { UsageError } from "../usage.ts";

/** The environment that a command is about, and who asks. */
export interface Place {
  server: string;
  client: BerthClient;
  environmentId: string;
}

/** What a command was called with. */
export interface Invocation {
  values: Readonly<Record<string, string | boolean | undefined>>;
  operands: readonly string[];
  terminal: Terminal;
}

export interface AutomationsCommand {
  /** What follows `berth automations`. */
  name: string;
  /** Its operands and options, as usage shows them. */
  usage: string;
  about: string;
  /** How many operands it takes. */
  operands: number;
  options: NonNullable<ParseArgsConfig["options"]>;
  run(place: Place, invocation: Invocation): Promise<ExitCode>;
}

export const PLACE_OPTIONS = { environment: { type: "string" }, server: { type: "string" } } as const;

const REQUEST_MS = 30_000;

const withoutApi = (url: string) => url.replace(/\/api\/?$/, "");

/** The server and the token that processes of an environment are given; undefined outside of one. */
function insideOf(env: NodeJS.ProcessEnv): { url: string; token: string } | undefined {
  const url = env.ONA_BASE_URL || env.GITPOD_BASE_URL;
  const token = env.ONA_API_KEY || env.GITPOD_API_KEY;
  return env.BERTH_ENVIRONMENT_ID && url && token ? { url: withoutApi(url), token } : undefined;
}

/** Which environment a command means, on which server, and with which token. Never is a token sent to another server. */
export async function openPlace(
  usage: string,
  env: NodeJS.ProcessEnv,
  named: { environment?: unknown; server?: unknown },
): Promise<Place> {
  const environmentId = String(named.environment ?? env.BERTH_ENVIRONMENT_ID ?? "");
  if (!environmentId)
    throw new UsageError(`outside of an environment --environment says which one is meant\n\n${usage}`);
  const inside = insideOf(env);
  const own = inside && (await serverOf(env, inside.url));
  const server = await serverOf(env, named.server === undefined ? own : withoutApi(String(named.server)));
  const token =
    env.BERTH_TOKEN || (server === own ? inside?.token : undefined) || (await findCredential(env, server))?.token;
  if (!token) throw new Failure(`you are not signed in to ${server}: run berth login ${server}, or set BERTH_TOKEN`);
  return { server, environmentId, client: createBerthClient({ baseUrl: server, token, defaultTimeoutMs: REQUEST_MS }) };
}

/** What the answer of a server means for people. */
export function refusalOf({ server }: Place, { code, rawMessage }: ConnectError): Failure {
  const text = printable(rawMessage);
  if (code === Code.Unauthenticated) {
    return new Failure(
      `${server} does not accept the token: ${text}. Sign in with berth login ${server}, or set BERTH_TOKEN`,
    );
  }
  const isRefusal = code !== Code.Unavailable && code !== Code.DeadlineExceeded && code !== Code.Unknown;
  return new Failure(isRefusal ? text : `${server} does not answer: ${text}`);
}
