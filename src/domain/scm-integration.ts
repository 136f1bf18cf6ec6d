import type { RunnerConfigurationSchema_SCMConfigSchema } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { FieldProblem } from "./errors.ts";

/** What an integration consists of; the client secret is present if one was given or is stored. */
export interface IntegrationParts {
  scmId: string;
  clientId: string;
  hasSecret: boolean;
  pat: boolean;
  issuerUrl: string;
  virtualDirectory: string;
}

const TEXT_LENGTH = 1024;
const SECRET_LENGTH = 4096;
// The product whose OAuth tokens come from a tenant of their own.
const TENANT_PRODUCT = "azuredevops_entra";
const DIRECTORY_PRODUCT = "azuredevops_server";

const isHttps = (text: string) => {
  const url = URL.parse(text);
  return url?.protocol === "https:" && !url.username && !url.password && !url.search && !url.hash;
};

/** What is wrong with an integration, given the product that the runner's schema has under its id. */
export function integrationProblems(
  parts: IntegrationParts,
  product: RunnerConfigurationSchema_SCMConfigSchema | undefined,
): FieldProblem[] {
  const { scmId, clientId, hasSecret, pat, issuerUrl, virtualDirectory } = parts;
  if (!product) return [{ field: "scm_id", message: "is not in the schema of the runner" }];
  const problems: FieldProblem[] = [];
  const check = (holds: boolean, field: string, message: string) => {
    if (!holds) problems.push({ field, message });
  };
  check(clientId.length <= TEXT_LENGTH, "oauth_client_id", `must have at most ${TEXT_LENGTH} characters`);
  check(!clientId || hasSecret, "oauth_plaintext_client_secret", "must come with the client id");
  check(!hasSecret || clientId !== "", "oauth_client_id", "must come with the client secret");
  check(!clientId || product.oauth !== undefined, "oauth_client_id", "is not offered by this product");
  check(!pat || product.pat !== undefined, "pat", "is not offered by this product");
  check(!issuerUrl || (isHttps(issuerUrl) && issuerUrl.length <= TEXT_LENGTH), "issuer_url", "must be an https URL");
  check(!clientId || scmId !== TENANT_PRODUCT || issuerUrl !== "", "issuer_url", "is required for this product");
  check(!virtualDirectory || scmId === DIRECTORY_PRODUCT, "virtual_directory", "is not for this product");
  const isPath = /^\/[^\s?#\\]*$/.test(virtualDirectory) && !virtualDirectory.split("/").includes("..");
  check(
    !virtualDirectory || (isPath && virtualDirectory.length <= TEXT_LENGTH),
    "virtual_directory",
    "must be a path that begins with a slash",
  );
  return problems;
}

/** What is wrong with a client secret as text. */
export const secretProblem = (secret: string | undefined): FieldProblem[] =>
  secret && secret.length > SECRET_LENGTH
    ? [{ field: "oauth_plaintext_client_secret", message: `must have at most ${SECRET_LENGTH} characters` }]
    : [];
