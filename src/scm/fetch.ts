import { request as httpRequest } from "node:http";
import { request as httpsRequest } from "node:https";
import { isIP, type LookupFunction } from "node:net";
import { ScmError } from "./errors.ts";
import type { Guard } from "./guard.ts";

/** Bounds of a request to a foreign host. */
export interface FetchLimits {
  /** Time for the whole answer. */
  timeoutMs: number;
  /** Largest body of an answer. */
  maxBytes: number;
}

/** What is sent; a redirect is an answer like any other and never followed. */
export interface FetchRequest {
  method?: string;
  headers?: Readonly<Record<string, string>>;
  body?: string | Uint8Array;
  signal?: AbortSignal;
}

const EMPTY_STATUSES: readonly number[] = [204, 205, 304];

/** Connections go to these addresses, whatever the name resolves to by now. */
function pinnedTo(addresses: readonly string[]): LookupFunction {
  const all = addresses.map((address) => ({ address, family: isIP(address) }));
  return (_host, { all: wantsAll }, callback) => {
    const [first = { address: "", family: 0 }] = all;
    if (wantsAll) callback(null, all);
    else callback(null, first.address, first.family);
  };
}

/**
 * Sends one request to a host that the guard admits; `vouched` as there. The answer comes as a whole. Throws ScmError:
 * what `admit` throws, or `unavailable` when the host does not answer within the limits.
 */
export async function guardedFetch(
  guard: Guard,
  target: string | URL,
  { method = "GET", headers = {}, body, signal }: FetchRequest,
  { timeoutMs, maxBytes, vouched = false }: FetchLimits & { vouched?: boolean },
): Promise<Response> {
  const deadline = AbortSignal.any([AbortSignal.timeout(timeoutMs), ...(signal ? [signal] : [])]);
  const { host, port, addresses, url: admitted } = await guard.admit(target, { vouched, signal: deadline });
  const { pathname, search, host: authority } = new URL(target);
  const send = admitted.protocol === "https:" ? httpsRequest : httpRequest;
  const { promise, resolve, reject } = Promise.withResolvers<Response>();
  const sent = send({
    ...{ host, port, path: pathname + search, method, agent: false, signal: deadline, lookup: pinnedTo(addresses) },
    ...(isIP(host) ? {} : { servername: host }),
    headers: { ...headers, host: authority, ...(body !== undefined && { "content-length": Buffer.byteLength(body) }) },
  });
  sent.on("error", reject);
  sent.on("response", (response) => {
    const chunks: Buffer[] = [];
    let size = 0;
    response.on("data", (chunk: Buffer) => {
      size += chunk.length;
      if (size > maxBytes) sent.destroy(new Error("the answer is too large"));
      else chunks.push(chunk);
    });
    response.on("error", reject);
    response.on("end", () => {
      const { statusCode: status = 502, rawHeaders } = response;
      const pairs = rawHeaders.flatMap((name, index): [string, string][] =>
        index % 2 === 0 ? [[name, rawHeaders[index + 1] ?? ""]] : [],
      );
      resolve(new Response(EMPTY_STATUSES.includes(status) ? null : Buffer.concat(chunks), { status, headers: pairs }));
    });
  });
  sent.end(body);
  return promise.catch((error: unknown) => {
    throw error instanceof ScmError ? error : new ScmError("unavailable", `host ${host} does not answer as it should`);
  });
}
