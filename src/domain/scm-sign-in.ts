/** Where and how people make a personal access token on a host. */
export interface TokenPage {
  createUrl: string;
  docsUrl: string;
  /** What such a token looks like. */
  example: string;
  requiredScopes: readonly string[];
}

type Page = Omit<TokenPage, "createUrl" | "docsUrl"> & { path: string };

const PAGES: Record<string, Page> = {
  github: {
    path: "/settings/tokens/new",
    example: "ghp_...",
    requiredScopes: ["repo", "read:user", "user:email", "workflow"],
  },
  gitlab: {
    path: "/-/user_settings/personal_access_tokens",
    example: "glpat-...",
    requiredScopes: ["api", "read_user", "read_repository"],
  },
  bitbucket: { path: "", example: "", requiredScopes: ["repository:write", "pullrequest", "account"] },
  azuredevops_entra: { path: "/_usersSettings/tokens", example: "", requiredScopes: ["vso.code_write"] },
  azuredevops_server: { path: "/_usersSettings/tokens", example: "", requiredScopes: ["vso.code_write"] },
};

/** How to make a token for a product on a host, a name with a port or, for Azure DevOps, an organization. */
export function tokenPage(scmId: string, host: string, docsUrl: string): TokenPage {
  const { path = "", example = "", requiredScopes = [] } = PAGES[scmId] ?? {};
  return { createUrl: `https://${host}${path}`, docsUrl, example, requiredScopes };
}
