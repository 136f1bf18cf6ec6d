import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import type { App } from "../app.ts";
import type { PortVisit } from "../domain/environment-ports.ts";
import { denied, type FieldProblem, Refusal, refuseProblems } from "../domain/errors.ts";
import { isUuid } from "../domain/ids.ts";
import type { Caller } from "../domain/principal.ts";
import { signedIn } from "../login/sessions.ts";
import { browserRoute, publicPath, redirect, type Visit } from "./browser.ts";
import type { HttpHandler } from "./exchange.ts";
import { answerPage, html } from "./html.ts";
import { organizationForms, signInPath } from "./login.ts";

const PATH = "/auth/port";
const MAX_PORT = 65_535;
const MAX_ADDRESS = 8192;

/** Where to send somebody with a token for the port; throws a refusal for whom it does not admit. */
export type EnterPort = (caller: Caller, visit: PortVisit) => Promise<string>;

function visitOf(query: URLSearchParams): PortVisit {
  const get = (name: string) => query.get(name) ?? "";
  const visit = { environmentId: get("environment_id"), port: Number(get("port")), returnTo: get("return_to") };
  const isPort = /^\d{1,5}$/.test(get("port")) && visit.port >= 1 && visit.port <= MAX_PORT;
  const isAddress = visit.returnTo.length <= MAX_ADDRESS && URL.canParse(visit.returnTo);
  const checks: [boolean, FieldProblem][] = [
    [isUuid(visit.environmentId), { field: "environment_id", message: "must be a UUID" }],
    [isPort, { field: "port", message: `must be from 1 to ${MAX_PORT}` }],
    [isAddress, { field: "return_to", message: `must be a URL of at most ${MAX_ADDRESS} characters` }],
  ];
  refuseProblems(checks.flatMap(([isRight, problem]) => (isRight ? [] : [problem])));
  return visit;
}

/** Where a form's answer may lead on to in the end; an origin that does not look like one is left out. */
function formTargets({ returnTo }: PortVisit): string[] {
  const { origin } = new URL(returnTo);
  return /^https?:\/\/[\w.-]+(:\d+)?$/.test(origin) ? [origin] : [];
}

const here = (app: App, { query }: Visit) => publicPath(app, `${PATH}?${query}`);

/** Offers the other organizations of somebody who sees no such port in this one. */
async function answerOrganizations(app: App, caller: Caller, visit: Visit, refusal: Refusal): Promise<void> {
  const others = await organizationForms(app, caller, here(app, visit));
  if (!others.text) throw refusal;
  const targets = { formTargets: formTargets(visitOf(visit.query)) };
  if (caller.principal !== Principal.USER) {
    return answerPage(visit.response, 200, { title: "Choose an organization", body: others, ...targets });
  }
  const body = html`<p>${refusal.message}.</p>${others}`;
  answerPage(visit.response, 404, { title: "This did not work", body, ...targets });
}

/** Sends somebody who wants to see a port back to it with a token, after signing in if need be. */
async function enter(app: App, enterPort: EnterPort, visit: Visit): Promise<void> {
  const { request, response } = visit;
  const port = visitOf(visit.query);
  const caller = await signedIn(app, request.headers.cookie);
  if (!caller) return redirect(response, signInPath(app, here(app, visit)));
  if (caller.principal !== Principal.USER) {
    return answerOrganizations(app, caller, visit, denied("you belong to no organization yet"));
  }
  try {
    redirect(response, await enterPort(caller, port));
  } catch (error) {
    if (!(error instanceof Refusal && error.kind === "not_found")) throw error;
    await answerOrganizations(app, caller, visit, error);
  }
}

/** The browser's way to ports of environments, by path. `limit` holds for everybody: each visit makes a token. */
export function portRoutes(app: App, limit: (peer: string) => number, enterPort: EnterPort): Map<string, HttpHandler> {
  return new Map([[PATH, browserRoute({ GET: (visit) => enter(app, enterPort, visit) }, limit)]]);
}
