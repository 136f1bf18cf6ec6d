import { isIP } from "node:net";
import { scmSchemas } from "../domain/environment-class.ts";

/** Ids of source-control products, as in a runner's schema. */
export type ScmId = "github" | "gitlab" | "bitbucket" | "azuredevops_entra" | "azuredevops_server" | "git";

/** What an admin declared about a host. */
export interface HostIntegration {
  /** Normalised, see `normalizeHost`; `dev.azure.com/<organization>` for a single organization. */
  host: string;
  scmId: string;
  /** Azure DevOps Server only: path below which collections live, such as `/tfs`. */
  virtualDirectory?: string;
}

export interface ScmHost {
  /** Lower case; a port unless it is the default; for Azure DevOps possibly an organization: `dev.azure.com/acme`. */
  host: string;
  scmId: ScmId;
  /** Display name of the product. */
  scmName: string;
}

/** User and secret for basic authentication. */
export interface GitCredentials {
  username: string;
  password: string;
}

export const AZURE_HOST = "dev.azure.com";

const PROVIDERS = scmSchemas("");
const SCM_IDS: ReadonlySet<string> = new Set(PROVIDERS.map(({ scmId }) => scmId));
const PROVIDER_OF_HOST = new Map(
  PROVIDERS.flatMap(({ defaultHosts, scmId }) => defaultHosts.map((host) => [host, scmId])),
);
const HOST_NAME = /^[a-z0-9_]([a-z0-9_.-]*[a-z0-9])?$/;
const ORGANIZATION = /^[a-z0-9][a-z0-9._-]*$/;
const MAX_HOST_LENGTH = 253;

export const isScmId = (text: string): text is ScmId => SCM_IDS.has(text);

/** Host name as it appears in a parsed URL, or an address: nothing that could pass for an option or a path. */
export const isHostName = (hostname: string) =>
  hostname.length <= MAX_HOST_LENGTH && (HOST_NAME.test(hostname) || isIP(hostname.replace(/^\[|\]$/g, "")) !== 0);

/** Organization of a host `{org}.visualstudio.com`, the older name of `dev.azure.com/{org}`. */
export const visualStudioOrganization = (hostname: string) => /^([^.]+)\.visualstudio\.com$/.exec(hostname)?.[1];

/** The integration for a path on a host: `host/firstSegment` if there is one, else `host`. */
export function findIntegration<T extends HostIntegration>(
  host: string,
  firstSegment: string,
  integrations: readonly T[],
): T | undefined {
  const exact = `${host}/${firstSegment}`.toLowerCase();
  return integrations.find((each) => each.host === exact) ?? integrations.find((each) => each.host === host);
}

/** The product behind a path on a host: what the integration says, else the product's own host, else `git`. */
export function scmIdOf(host: string, firstSegment: string, integrations: readonly HostIntegration[] = []): ScmId {
  const scmId = findIntegration(host, firstSegment, integrations)?.scmId ?? PROVIDER_OF_HOST.get(host) ?? "git";
  return isScmId(scmId) ? scmId : "git";
}

/**
 * Reads what people enter as a host: `GitHub.com`, `https://github.com/`, `dev.azure.com/acme`, `acme.visualstudio.com`,
 * `localhost:3000`. Undefined if it names no host, or more than a host.
 */
export function normalizeHost(text: string, integrations: readonly HostIntegration[] = []): ScmHost | undefined {
  if (/[\s\p{Cc}\\?#]/u.test(text)) return undefined;
  const url = URL.parse(text.includes("://") ? text : `https://${text}`);
  if (!url || !/^https?:$/.test(url.protocol) || url.password || !isHostName(url.hostname)) return undefined;
  const older = visualStudioOrganization(url.hostname);
  const isAzure = older !== undefined || url.hostname === AZURE_HOST;
  const segments = [...(older ? [older] : []), ...url.pathname.split("/").filter(Boolean)];
  if (segments.length > (isAzure ? 1 : 0) || (url.username && !isAzure)) return undefined;
  const organization = segments[0]?.toLowerCase() ?? "";
  if (organization && !ORGANIZATION.test(organization)) return undefined;
  const name = isAzure ? AZURE_HOST : url.host;
  const scmId = scmIdOf(name, organization, integrations);
  const scmName = PROVIDERS.find((each) => each.scmId === scmId)?.name ?? scmId;
  return { host: organization ? `${name}/${organization}` : name, scmId, scmName };
}

/** The basic-authentication form of a stored token, by product. */
export function gitCredentials(scmId: ScmId, secret: string): GitCredentials {
  const [user, ...rest] = secret.split(":");
  const pair = user && rest.length > 0 ? { username: user, password: rest.join(":") } : undefined;
  switch (scmId) {
    case "github":
      return { username: "x-access-token", password: secret };
    case "gitlab":
      return { username: "oauth2", password: secret };
    case "bitbucket":
      return pair ?? { username: "x-token-auth", password: secret };
    case "azuredevops_entra":
    case "azuredevops_server":
      return { username: "token", password: secret };
    case "git":
      return pair ?? { username: "git", password: secret };
  }
}
