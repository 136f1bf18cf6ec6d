import type { IncomingMessage } from "node:http";
import type { Duplex } from "node:stream";
import { IntrospectTokenResponse_Kind as Kind } from "../../../gen/berth/runner/v1/runner_control_pb.js";
import { AdmissionLevel } from "../../../gen/gitpod/v1/environment_pb.js";
import { admits } from "../../domain/environment-ports.ts";
import type { HttpRequest, HttpResponse } from "../../http/exchange.ts";
import type { Access, Grant } from "../access.ts";
import type { OpenPort } from "../environment.ts";
import type { Environments } from "../environments.ts";
import { type Presented, portCookie, presented, withoutToken } from "./credential.ts";
import { portOwnership } from "./owner.ts";
import { proxyRequest, proxyUpgrade, refuseUpgrade, type Upstream } from "./proxy.ts";
import { type PortRoute, portUrl } from "./route.ts";

/** What the ports of environments are served with. */
export interface PortDeps {
  environments: Environments;
  access: Access;
  /** Public base URL of the runner, and the domain below which each port has a host of its own, if there is one. */
  publicUrl(): string;
  domain: string | undefined;
  /** Base URL of the control plane for browsers, where people sign in. */
  signInUrl: string;
  /** The organization shares no ports. */
  isSharingOff(): boolean;
}

const KINDS = [Kind.PORT_ACCESS, Kind.ENVIRONMENT_ACCESS];
/** How soon what the runner itself knows ends a connection, and how often the control plane is asked. */
const LOOK_MS = 1_000;
const RECHECK_MS = 30_000;
/** Open requests and connections to the ports of one environment. */
const MAX_OPEN = 500;

/** A refusal as HTTP tells it. */
interface Refused {
  status: number;
  text: string;
}

const NOT_LISTED = { status: 404, text: "no such port" };
const NOT_RUNNING = { status: 502, text: "the environment is not running" };
const SHARING_OFF = { status: 403, text: "sharing ports is switched off in this organization" };
const NOBODY_LISTENS = { status: 502, text: "nothing of this environment listens on the port" };
const NO_ANSWER = { status: 502, text: "the service does not answer" };
const UNCHECKED = { status: 502, text: "the token cannot be checked at the moment" };
const SIGN_IN = { status: 401, text: "a valid access token for the port is needed" };
const FOREIGN = { status: 403, text: "the token is for something else" };
const BUSY = { status: 503, text: "too many connections to the environment are open" };

const isRefused = (value: object): value is Refused => "status" in value && "text" in value;

/** A request that may pass, and what has to hold for as long as it takes. */
interface Passage {
  upstream: Upstream;
  /** False once the port has closed or no longer admits the token's owner, as far as the runner has heard. */
  isOpen(): boolean;
  /** The control plane says that the token is no longer good. */
  isWithdrawn(): Promise<boolean>;
}

/** Serves the ports of environments, each to whom it admits and from its own processes only. */
export function portServer(deps: PortDeps) {
  const { environments, access, domain, signInUrl } = deps;
  const listeningAddress = portOwnership();
  const open = new Map<string, number>();

  function opensFor(port: OpenPort, grant: Grant): boolean {
    const { port: number, authNonce } = port.entry;
    const isAimed = grant.kind !== Kind.PORT_ACCESS || (grant.port === number && grant.authNonce === authNonce);
    return isAimed && admits(port.entry, port.creatorId, grant.subjectId);
  }

  /** Whether the token opens the port; a port for everybody needs none. */
  async function judge(
    route: PortRoute,
    port: OpenPort,
    credential: Presented | undefined,
  ): Promise<Refused | Grant | undefined> {
    if (port.entry.admission === AdmissionLevel.EVERYONE) return undefined;
    const verdict = await access.judge(credential?.token, route.environmentId, KINDS);
    if (verdict === "none") return SIGN_IN;
    if (verdict === "other") return FOREIGN;
    if (verdict === "unknown") return UNCHECKED;
    return opensFor(port, verdict.grant) ? verdict.grant : FOREIGN;
  }

  function portOf({ environmentId, port }: PortRoute): OpenPort | Refused {
    const environment = environments.get(environmentId);
    if (!environment) return NOT_LISTED;
    const opened = environment.openPort(port);
    if (opened && deps.isSharingOff()) return SHARING_OFF;
    return opened ?? (environment.operations ? NOT_LISTED : NOT_RUNNING);
  }

  async function pass(route: PortRoute, credential: Presented | undefined): Promise<Passage | Refused> {
    const port = portOf(route);
    if (isRefused(port)) return port;
    const grant = await judge(route, port, credential);
    if (grant && isRefused(grant)) return grant;
    const address = await listeningAddress(port.owner, route.port);
    if (!address) return NOBODY_LISTENS;
    const { scheme } = addressOf(route);
    const { port: number, target: path, prefix } = route;
    const upstream = { address, port: number, protocol: port.entry.protocol, path, prefix, scheme };
    const isOpen = () => {
      const now = portOf(route);
      if (isRefused(now)) return false;
      return now.entry.admission === AdmissionLevel.EVERYONE || (grant !== undefined && opensFor(now, grant));
    };
    const isWithdrawn = async () => grant !== undefined && access.isWithdrawn(credential?.token ?? "", grant);
    return { upstream, isOpen, isWithdrawn };
  }

  function addressOf(route: PortRoute): { url: string; scheme: string } {
    const url = portUrl(deps.publicUrl(), domain, route.environmentId, route.port);
    return { url, scheme: new URL(url).protocol.slice(0, -1) };
  }

  /** Counts what is open, and looks again from time to time whether it may stay so. */
  async function whileOpen(
    environmentId: string,
    passage: Passage,
    work: (signal: AbortSignal) => Promise<void>,
  ): Promise<Refused | undefined> {
    const count = open.get(environmentId) ?? 0;
    if (count >= MAX_OPEN) return BUSY;
    open.set(environmentId, count + 1);
    const ended = new AbortController();
    let asked = Date.now();
    const check = setInterval(() => {
      if (!passage.isOpen()) ended.abort();
      if (Date.now() - asked < RECHECK_MS) return;
      asked = Date.now();
      void passage.isWithdrawn().then((isWithdrawn) => isWithdrawn && ended.abort());
    }, LOOK_MS);
    try {
      await work(ended.signal);
      return undefined;
    } finally {
      clearInterval(check);
      const left = (open.get(environmentId) ?? 1) - 1;
      if (left > 0) open.set(environmentId, left);
      else open.delete(environmentId);
    }
  }

  /** A person in front of a browser is sent to sign in and comes back with a token; for programs it is an error. */
  function refuse(
    route: PortRoute,
    request: HttpRequest,
    response: HttpResponse,
    refused: Refused,
    by?: Presented["by"],
  ): void {
    const isPerson = request.method === "GET" && String(request.headers.accept ?? "").includes("text/html");
    // A cookie may be older than the port's admission. A token from there that is refused would be so again, and again.
    const mayHelp =
      by === "cookie" ? refused === SIGN_IN || refused === FOREIGN : refused === SIGN_IN && by !== "query";
    if (isPerson && mayHelp) {
      const { url } = addressOf(route);
      const target = withoutToken(route.target);
      const query = new URLSearchParams({ environment_id: route.environmentId, port: String(route.port) });
      query.set("return_to", url.replace(/\/$/, "") + target);
      response.writeHead(302, { location: `${signInUrl}/auth/port?${query}`, "cache-control": "no-store" });
      response.end();
      return;
    }
    response.writeHead(refused.status, {
      "content-type": "text/plain; charset=utf-8",
      "cache-control": "no-store",
      ...(refused.status === 401 && { "www-authenticate": "Bearer" }),
    });
    response.end(`${refused.text}\n`);
  }

  /** The token came in the address: it moves into a cookie, and out of history and logs. */
  function keep(route: PortRoute, token: string, response: HttpResponse): void {
    const { scheme } = addressOf(route);
    response.writeHead(303, {
      location: route.prefix + withoutToken(route.target),
      "set-cookie": portCookie(token, route.prefix, scheme === "https"),
      "cache-control": "no-store",
      "referrer-policy": "no-referrer",
    });
    response.end();
  }

  /**
   * Somebody comes with a token in the address: it moves into a cookie. The control plane's are exchanged, once; whoever
   * comes with one again goes on with the cookie that they have.
   */
  async function moveIn(route: PortRoute, request: HttpRequest, response: HttpResponse, given: string): Promise<void> {
    const port = portOf(route);
    if (isRefused(port)) return refuse(route, request, response, port, "query");
    let token: string;
    try {
      token = (await access.redeem(given)) ?? given;
    } catch {
      return refuse(route, request, response, UNCHECKED, "query");
    }
    const refused = await judge(route, port, { token, by: "query" });
    if (!refused || !isRefused(refused)) return keep(route, token, response);
    const earlier = presented(request.headers, route.prefix);
    const found = earlier?.by === "cookie" ? await judge(route, port, earlier) : refused;
    if (earlier && found && !isRefused(found)) return keep(route, earlier.token, response);
    refuse(route, request, response, refused, "query");
  }

  return {
    async serve(route: PortRoute, request: HttpRequest, response: HttpResponse): Promise<void> {
      const credential = presented(request.headers, route.target);
      if (credential?.by === "query") return await moveIn(route, request, response, credential.token);
      const passage = await pass(route, credential);
      if (isRefused(passage)) return refuse(route, request, response, passage, credential?.by);
      const refused = await whileOpen(route.environmentId, passage, (signal) =>
        proxyRequest(request, response, passage.upstream, signal, () => refuse(route, request, response, NO_ANSWER)),
      );
      if (refused) refuse(route, request, response, refused);
    },
    async upgrade(route: PortRoute, request: IncomingMessage, socket: Duplex, head: Buffer): Promise<void> {
      const passage = await pass(route, presented(request.headers, route.target));
      if (isRefused(passage)) return refuseUpgrade(socket, passage.status, passage.text);
      const refused = await whileOpen(route.environmentId, passage, (signal) =>
        proxyUpgrade(request, socket, head, passage.upstream, signal),
      );
      if (refused) refuseUpgrade(socket, refused.status, refused.text);
    },
  };
}
