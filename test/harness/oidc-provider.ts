import { createHash, randomBytes } from "node:crypto";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { exportJWK, generateKeyPair, SignJWT } from "jose";

/** What a provider was asked with when it was asked to sign somebody in. */
export interface Authorization {
  clientId: string;
  redirectUri: string;
  scope: string;
  state: string;
  nonce: string;
  codeChallenge: string;
  method: string;
}

/** How the next logins go; all of it is as it should be unless a test says otherwise. */
export interface Behaviour {
  /** Claims of the person. */
  claims: Record<string, unknown>;
  /** Claims that userinfo adds. */
  userinfo: Record<string, unknown>;
  /** Error code that the browser brings back in place of a code. */
  error: string | undefined;
  /** Changes claims of the ID token that belong to the protocol. */
  token: Record<string, unknown>;
  /** Algorithm of the signature; HS256 signs with the client's secret. */
  algorithm: "RS256" | "HS256" | "none";
  /** Signs with a key that is not published. */
  foreignKey: boolean;
  /** Status that every endpoint but discovery answers with. */
  down: number | undefined;
}

const CLIENT = { id: "berth", secret: "s3cret+/=%:client" };

/** An OpenID provider on the loopback that signs everybody in without a question. */
export class OidcProvider implements AsyncDisposable {
  readonly client = CLIENT;
  readonly authorizations: Authorization[] = [];
  /** Ways in which the client showed its secret. */
  readonly authentications: string[] = [];
  behaviour: Behaviour;
  readonly issuer: string;
  readonly #close: () => Promise<void>;
  readonly #codes = new Map<string, Authorization>();
  readonly #keys: Promise<{ known: Awaited<ReturnType<typeof newKey>>; foreign: Awaited<ReturnType<typeof newKey>> }>;
  readonly #methods: readonly string[];

  private constructor(issuer: string, close: () => Promise<void>, methods: readonly string[]) {
    this.issuer = issuer;
    this.#close = close;
    this.#methods = methods;
    this.#keys = Promise.all([newKey(), newKey()]).then(([known, foreign]) => ({ known, foreign }));
    this.behaviour = { ...USUAL };
  }

  /** Opens one; `methods` are the ways in which it lets clients show their secret. */
  static async start(methods: readonly string[] = ["client_secret_basic"]): Promise<OidcProvider> {
    const server = createServer((request, response) => {
      provider.#serve(request, response).catch((error) => {
        response.writeHead(500).end(String(error));
      });
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const issuer = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
    const close = () =>
      new Promise<void>((resolve) => {
        server.closeAllConnections();
        server.close(() => resolve());
      });
    const provider = new OidcProvider(issuer, close, methods);
    return provider;
  }

  /** As an entry of BERTH_OIDC_PROVIDERS. */
  config(id = "test", name = "Test & Co") {
    return { id, name, issuer: this.issuer, client_id: CLIENT.id, client_secret: CLIENT.secret };
  }

  /** Lets somebody sign in next, with a verified address, in the usual way but for these changes. */
  signsIn(claims: Record<string, unknown>, changes: Partial<Behaviour> = {}): void {
    this.behaviour = { ...USUAL, claims: { email_verified: true, ...claims }, ...changes };
  }

  async #serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const url = new URL(request.url ?? "", this.issuer);
    const json = (status: number, body: object) => {
      response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify(body));
    };
    if (url.pathname === "/.well-known/openid-configuration") return json(200, this.#metadata());
    if (this.behaviour.down) return json(this.behaviour.down, { error: "server_error" });
    switch (url.pathname) {
      case "/authorize":
        response.writeHead(302, { location: this.#authorize(url.searchParams) }).end();
        return;
      case "/jwks":
        return json(200, { keys: [(await this.#keys).known.jwk] });
      case "/token":
        return json(...(await this.#token(request, new URLSearchParams(await textOf(request)))));
      case "/userinfo":
        return json(200, { sub: this.behaviour.claims.sub, ...this.behaviour.userinfo });
    }
    json(404, {});
  }

  #metadata() {
    const endpoints = { authorization_endpoint: "authorize", token_endpoint: "token", jwks_uri: "jwks" };
    return {
      issuer: this.issuer,
      ...Object.fromEntries(Object.entries(endpoints).map(([name, path]) => [name, `${this.issuer}/${path}`])),
      userinfo_endpoint: `${this.issuer}/userinfo`,
      response_types_supported: ["code"],
      subject_types_supported: ["public"],
      id_token_signing_alg_values_supported: ["RS256", "HS256", "none"],
      token_endpoint_auth_methods_supported: this.#methods,
      authorization_response_iss_parameter_supported: true,
    };
  }

  #authorize(query: URLSearchParams): string {
    const get = (name: string) => query.get(name) ?? "";
    const asked: Authorization = {
      ...{ clientId: get("client_id"), redirectUri: get("redirect_uri"), scope: get("scope"), state: get("state") },
      ...{ nonce: get("nonce"), codeChallenge: get("code_challenge"), method: get("code_challenge_method") },
    };
    this.authorizations.push(asked);
    const back = new URL(asked.redirectUri);
    back.searchParams.set("state", asked.state);
    back.searchParams.set("iss", this.issuer);
    if (this.behaviour.error) {
      back.searchParams.set("error", this.behaviour.error);
      return back.href;
    }
    const code = randomBytes(16).toString("hex");
    this.#codes.set(code, asked);
    back.searchParams.set("code", code);
    return back.href;
  }

  #isClient(request: IncomingMessage, form: URLSearchParams): boolean {
    const { authorization } = request.headers;
    if (authorization) {
      this.authentications.push("client_secret_basic");
      const [, credentials = ""] = authorization.split(" ");
      const given = Buffer.from(credentials, "base64").toString().split(":");
      return given.map(decodeURIComponent).join(" ") === `${CLIENT.id} ${CLIENT.secret}`;
    }
    this.authentications.push("client_secret_post");
    return form.get("client_id") === CLIENT.id && form.get("client_secret") === CLIENT.secret;
  }

  async #token(request: IncomingMessage, form: URLSearchParams): Promise<[number, object]> {
    if (!this.#isClient(request, form)) return [401, { error: "invalid_client" }];
    const code = form.get("code") ?? "";
    const asked = this.#codes.get(code);
    this.#codes.delete(code);
    const challenge = createHash("sha256")
      .update(form.get("code_verifier") ?? "")
      .digest("base64url");
    const isGrant = asked?.codeChallenge === challenge && asked.redirectUri === form.get("redirect_uri");
    if (!asked || !isGrant) return [400, { error: "invalid_grant" }];
    return [200, { access_token: "access", token_type: "Bearer", id_token: await this.#idToken(asked.nonce) }];
  }

  async #idToken(nonce: string): Promise<string> {
    const { claims, token, algorithm, foreignKey } = this.behaviour;
    const now = Math.floor(Date.now() / 1000);
    const payload = { iss: this.issuer, aud: CLIENT.id, iat: now, exp: now + 300, nonce, ...claims, ...token };
    const { known, foreign } = await this.#keys;
    if (algorithm === "none") {
      const part = (value: object) => Buffer.from(JSON.stringify(value)).toString("base64url");
      return `${part({ alg: "none" })}.${part(payload)}.`;
    }
    const key =
      algorithm === "HS256" ? Buffer.from(CLIENT.secret.padEnd(32, "-")) : (foreignKey ? foreign : known).privateKey;
    return new SignJWT(payload).setProtectedHeader({ alg: algorithm, kid: "key" }).sign(key);
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#close();
  }
}

const USUAL: Behaviour = {
  ...{ claims: {}, userinfo: {}, error: undefined, token: {} },
  ...{ algorithm: "RS256", foreignKey: false, down: undefined },
};

async function newKey() {
  const { publicKey, privateKey } = await generateKeyPair("RS256");
  return { privateKey, jwk: { ...(await exportJWK(publicKey)), kid: "key", use: "sig" } };
}

async function textOf(request: IncomingMessage): Promise<string> {
  let text = "";
  for await (const chunk of request.setEncoding("utf8")) text += chunk;
  return text;
}
