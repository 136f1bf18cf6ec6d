import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import type { App } from "../app.ts";
import { cookieRules, cookieValue, safeReturnTo, setCookie } from "../domain/browser.ts";
import { Refusal } from "../domain/errors.ts";
import type { Caller } from "../domain/principal.ts";
import { createOidc, type Oidc } from "../login/oidc.ts";
import { chooseOrganization, organizationsOf, signedIn, signOut } from "../login/sessions.ts";
import { CALLBACK_PATH, chooseProvider, FLOW_MS, finishSignIn, startSignIn } from "../login/sign-in.ts";
import {
  answerOrRedirect,
  browserRoute,
  checkOrigin,
  publicPath,
  readFields,
  redirect,
  type Visit,
} from "./browser.ts";
import type { HttpHandler } from "./exchange.ts";
import { answerPage, type Html, html } from "./html.ts";

const START_PATH = "/auth/oidc/start";
const ORGANIZATION_PATH = "/auth/session/organization";
const LOGOUT_PATH = "/auth/logout";

/** Where to sign in and come back from. */
export const signInPath = (app: App, returnTo: string) =>
  publicPath(app, `${START_PATH}?${new URLSearchParams({ return_to: returnTo })}`);

const sessionOf = (app: App, { request }: Visit) =>
  cookieValue(request.headers.cookie, cookieRules(app.config.publicUrl).session);

/** Whoever has signed in; UNAUTHENTICATED if nobody has. */
export async function visitor(app: App, { request }: Visit): Promise<Caller> {
  const caller = await signedIn(app, request.headers.cookie);
  if (!caller) throw new Refusal("unauthenticated", "you are not signed in");
  return caller;
}

function sessionCookie(app: App, session: string): string {
  const { publicUrl, login } = app.config;
  const rules = cookieRules(publicUrl);
  return setCookie(rules.session, session, session ? login.sessionMaxMs / 1000 : 0, rules);
}

const returnTo = (app: App, text: string | undefined) =>
  safeReturnTo(text ?? "", app.config.publicUrl, app.config.login.returnToOrigins);

function answerChoice(app: App, { response, query }: Visit): void {
  const link = (provider: string) => {
    const parameters = new URLSearchParams({ provider, return_to: query.get("return_to") ?? "" });
    return publicPath(app, `${START_PATH}?${parameters}`);
  };
  const links = app.config.login.providers.map(
    ({ id, name }) => html`<p><a class="button" href="${link(id)}">Sign in with ${name}</a></p>`,
  );
  answerPage(response, 200, { title: "Sign in", body: html`${links}` });
}

async function start(app: App, oidc: Oidc, visit: Visit): Promise<void> {
  const { request, response, query } = visit;
  const rules = cookieRules(app.config.publicUrl);
  if (rules.secure && !app.config.publicUrl.startsWith("https:")) {
    throw new Refusal(
      "failed_precondition",
      "browsers can sign in over https only: BERTH_PUBLIC_URL has to begin with it",
    );
  }
  // Organizations have no providers of their own yet that an address could lead to.
  if (query.has("email") || query.has("sso_configuration_id")) {
    throw new Refusal("not_found", "there is no such way to sign in");
  }
  const provider = chooseProvider(app, query.get("provider") ?? undefined);
  if (!provider) return answerChoice(app, visit);
  const { url, browser } = await startSignIn(app, oidc, {
    provider,
    returnTo: query.get("return_to") ?? "",
    browser: cookieValue(request.headers.cookie, rules.flow),
  });
  redirect(response, url, [setCookie(rules.flow, browser, FLOW_MS / 1000, rules)]);
}

async function callback(app: App, oidc: Oidc, visit: Visit): Promise<void> {
  const { request, response, query } = visit;
  const { session, returnTo: target } = await finishSignIn(app, oidc, {
    query,
    browser: cookieValue(request.headers.cookie, cookieRules(app.config.publicUrl).flow),
    replaces: sessionOf(app, visit),
  });
  redirect(response, target, [sessionCookie(app, session)]);
}

async function choose(app: App, visit: Visit): Promise<void> {
  checkOrigin(visit.request);
  const fields = await readFields(visit);
  const caller = await visitor(app, visit);
  const organizationId = fields.get("organizationId") ?? "";
  const session = await chooseOrganization(app, caller, sessionOf(app, visit) ?? "", organizationId);
  const target = returnTo(app, fields.get("return_to"));
  answerOrRedirect(visit, { organizationId }, target, [sessionCookie(app, session)]);
}

async function logout(app: App, visit: Visit): Promise<void> {
  checkOrigin(visit.request);
  visit.request.resume();
  const caller = await signedIn(app, visit.request.headers.cookie);
  if (caller) await signOut(app, caller, sessionOf(app, visit) ?? "");
  answerOrRedirect(visit, {}, publicPath(app, "/"), [sessionCookie(app, "")]);
}

/** Buttons for the organizations in which somebody can act. */
export async function organizationForms(app: App, caller: Caller, target: string): Promise<Html> {
  const memberships = (await organizationsOf(app, caller)).filter(
    ({ organizationId }) => organizationId !== caller.organizationId,
  );
  if (memberships.length === 0) return html``;
  const forms = memberships.map(
    ({ organizationId, organizationName }) => html`<form method="post" action="${publicPath(app, ORGANIZATION_PATH)}">
<input type="hidden" name="organizationId" value="${organizationId}"><input type="hidden" name="return_to" value="${target}">
<button class="quiet">${organizationName}</button></form>`,
  );
  return html`<p>Go on in another organization:</p>${forms}`;
}

async function home(app: App, visit: Visit): Promise<void> {
  const { request, response } = visit;
  const caller = await signedIn(app, request.headers.cookie);
  if (!caller) {
    const isOffered = app.config.login.providers.length > 0;
    const link = html`<p><a class="button" href="${signInPath(app, publicPath(app, "/"))}">Sign in</a></p>`;
    return answerPage(response, 200, { title: "berth", body: isOffered ? link : html`<p>The API is served here.</p>` });
  }
  const others = await organizationForms(app, caller, publicPath(app, "/"));
  const where =
    caller.principal === Principal.USER
      ? html`<p>Get a token for the command line with <code>berth login ${app.config.publicUrl}</code></p>`
      : html`<p>You have not chosen an organization.</p>`;
  const body = html`<p>Signed in as ${caller.name} (${caller.email})</p>${where}${others}
<form method="post" action="${publicPath(app, LOGOUT_PATH)}"><button>Sign out</button></form>`;
  const formTargets = app.config.login.returnToOrigins;
  answerPage(response, 200, { title: "berth", body, formTargets });
}

/** Signing in and out with a browser, by path. `limit` holds for what needs no login. */
export function loginRoutes(app: App, limit: (peer: string) => number): Map<string, HttpHandler> {
  const oidc = createOidc(app);
  return new Map([
    ["/", browserRoute({ GET: (visit) => home(app, visit) })],
    [START_PATH, browserRoute({ GET: (visit) => start(app, oidc, visit) }, limit)],
    [CALLBACK_PATH, browserRoute({ GET: (visit) => callback(app, oidc, visit) }, limit)],
    [ORGANIZATION_PATH, browserRoute({ POST: (visit) => choose(app, visit) })],
    [LOGOUT_PATH, browserRoute({ POST: (visit) => logout(app, visit) })],
  ]);
}
