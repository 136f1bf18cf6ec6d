import { type IncomingMessage, request as requestHttp } from "node:http";
import { request as requestHttps } from "node:https";
import { text } from "node:stream/consumers";
import { setTimeout as delay } from "node:timers/promises";
import { Failure } from "../exit.ts";
import { printable } from "../output.ts";
import type { Place } from "./command.ts";

const HEADERS_MS = 30_000;
const KEEP_ALIVE_MS = 30_000;
const RETRIES = 3;
const RETRY_MS = 1000;
const NOT_READY = 502;

/** How a log is asked for. */
export interface LogOptions {
  follow: boolean;
  /** Only the last so many lines of what is stored. */
  tail?: string | undefined;
  /** Id of the only step to read. */
  step?: string | undefined;
  timestamps?: boolean;
}

function logUrl(logUrl: string, { follow, tail, step, timestamps }: LogOptions): URL {
  const url = URL.parse(logUrl);
  if (!url || !/^https?:$/.test(url.protocol))
    throw new Failure(`the address of the log is none: ${printable(logUrl)}`);
  if (!follow) url.searchParams.set("follow", "false");
  if (tail !== undefined) url.searchParams.set("tail", tail);
  if (step !== undefined) url.searchParams.set("step", step);
  if (timestamps) url.searchParams.set("timestamps", "true");
  return url;
}

/** Asks without `fetch`, which gives up a log that says nothing for five minutes. Redirections are not followed. */
function get(url: URL, token: string, signal: AbortSignal): Promise<IncomingMessage> {
  const send = url.protocol === "https:" ? requestHttps : requestHttp;
  return new Promise((resolve, reject) => {
    const request = send(url, { headers: { authorization: `Bearer ${token}` }, signal, agent: false });
    request.setTimeout(HEADERS_MS, () => request.destroy(new Error("no answer in time")));
    request.once("error", reject);
    request.once("response", (response) => {
      request.setTimeout(0);
      // A runner that has vanished is noticed even if the log is silent.
      response.socket.setKeepAlive(true, KEEP_ALIVE_MS);
      resolve(response);
    });
    request.end();
  });
}

async function open(url: URL, token: string, signal: AbortSignal): Promise<IncomingMessage> {
  for (let attempt = 0; ; attempt++) {
    const response = await get(url, token, signal);
    const { statusCode = 0 } = response;
    if (statusCode === 200) return response;
    const reason = printable((await text(response)).slice(0, 300)).trim();
    if (statusCode !== NOT_READY || attempt === RETRIES) throw new Error(`${statusCode} ${reason}`);
    await delay(RETRY_MS, undefined, { signal });
  }
}

/** The text of a log as it is, until it ends or `signal` ends reading; a Failure if it cannot be read to its end. */
export async function* readLog(
  { client, environmentId }: Place,
  address: string,
  options: LogOptions,
  signal: AbortSignal,
): AsyncGenerator<Uint8Array> {
  const url = logUrl(address, options);
  const { accessToken } = await client.environments.createEnvironmentLogsToken({ environmentId });
  try {
    yield* await open(url, accessToken, signal);
  } catch (error) {
    if (signal.aborted) return;
    throw new Failure(`the log cannot be read from ${url.host}: ${error instanceof Error ? error.message : error}`);
  }
}
