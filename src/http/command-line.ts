import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import type { App } from "../app.ts";
import { agree, type CliLogin, callbackOf, checkCliLogin, swap } from "../login/command-line.ts";
import { signedIn } from "../login/sessions.ts";
import { browserRoute, checkOrigin, publicPath, readFields, redirect, type Visit } from "./browser.ts";
import { answerJson, type HttpHandler } from "./exchange.ts";
import { answerPage, html } from "./html.ts";
import { organizationForms, signInPath, visitor } from "./login.ts";

const PATH = "/auth/cli";
const TOKEN_PATH = "/auth/cli/token";

/** What a page or its form says about the command that waits. */
function loginOf(fields: { get(name: string): string | null | undefined }): CliLogin {
  const get = (name: string) => fields.get(name) ?? "";
  const login = {
    port: get("port"),
    state: get("state"),
    codeChallenge: get("code_challenge"),
    machine: get("machine"),
  };
  checkCliLogin(login);
  return login;
}

function fieldsOf({ port, state, codeChallenge, machine }: CliLogin): Record<string, string> {
  return { port, state, code_challenge: codeChallenge, machine };
}

/** Asks whoever has signed in whether a command may act for them. */
async function ask(app: App, { request, response, query }: Visit): Promise<void> {
  const login = loginOf(query);
  const here = publicPath(app, `${PATH}?${new URLSearchParams(fieldsOf(login))}`);
  const caller = await signedIn(app, request.headers.cookie);
  if (!caller) return redirect(response, signInPath(app, here));
  const others = await organizationForms(app, caller, here);
  if (caller.principal !== Principal.USER) {
    const body = others.text ? others : html`<p>You belong to no organization yet.</p>`;
    return answerPage(response, 200, { title: "Choose an organization", body });
  }
  const hidden = Object.entries(fieldsOf(login)).map(
    ([name, value]) => html`<input type="hidden" name="${name}" value="${value}">`,
  );
  const where = login.machine ? html` on <strong>${login.machine}</strong>` : html``;
  const body = html`<p><code>berth login</code>${where} asks for a token that acts as ${caller.name} (${caller.email}) for 30 days.
Agree only if it was you who ran it.</p>
<form method="post" action="${publicPath(app, PATH)}">${hidden}<button>Agree</button></form>${others}`;
  answerPage(response, 200, {
    title: "Sign in on the command line",
    body,
    formTargets: [`http://127.0.0.1:${login.port}`],
  });
}

async function answer(app: App, visit: Visit): Promise<void> {
  checkOrigin(visit.request);
  const login = loginOf(await readFields(visit));
  const code = await agree(app, await visitor(app, visit), login);
  redirect(visit.response, callbackOf(login, code));
}

async function token(app: App, visit: Visit): Promise<void> {
  const fields = await readFields(visit);
  const issued = await swap(app, fields.get("code") ?? "", fields.get("code_verifier") ?? "");
  answerJson(visit.response, 200, issued, { "cache-control": "no-store" });
}

/** The browser's part of `berth login`, by path. `limit` holds for what needs no login. */
export function commandLineRoutes(app: App, limit: (peer: string) => number): Map<string, HttpHandler> {
  return new Map([
    [PATH, browserRoute({ GET: (visit) => ask(app, visit), POST: (visit) => answer(app, visit) })],
    [TOKEN_PATH, browserRoute({ POST: (visit) => token(app, visit) }, limit)],
  ]);
}
