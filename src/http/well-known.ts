import { answerJson, type HttpHandler } from "./exchange.ts";
import { onlyGet } from "./methods.ts";

const CACHED = { "cache-control": "public, max-age=300", "access-control-allow-origin": "*" };
const JWKS_PATH = "/.well-known/jwks.json";

/** What others need to check ID tokens of the installation (OpenID Connect Discovery 1.0), by path. */
export function wellKnown(issuer: string, publicKeys: () => Promise<object>): Map<string, HttpHandler> {
  const configuration = {
    issuer,
    jwks_uri: issuer + JWKS_PATH,
    response_types_supported: ["id_token"],
    subject_types_supported: ["public"],
    id_token_signing_alg_values_supported: ["RS256"],
  };
  return new Map([
    [
      "/.well-known/openid-configuration",
      onlyGet((_request, response) => answerJson(response, 200, configuration, CACHED)),
    ],
    [JWKS_PATH, onlyGet(async (_request, response) => answerJson(response, 200, await publicKeys(), CACHED))],
  ]);
}
