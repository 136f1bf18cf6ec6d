import type { ServiceImpl } from "@connectrpc/connect";
import type { OIDCConfig, OrganizationService } from "../../../gen/gitpod/v1/organization_pb.js";
import { type App, actorOf, transact } from "../../app.ts";
import { denied, refuseProblems } from "../../domain/errors.ts";
import { defaultOidcConfig, oidcConfigProblems, sameOidcConfig } from "../../domain/id-tokens.ts";
import { type Caller, ownOrganization } from "../../domain/principal.ts";
import { principal } from "../../rpc/authenticate.ts";
import { readOidcConfig, setOidcConfig } from "../../store/id-tokens.ts";

async function updateOidcConfig(app: App, caller: Caller, config: OIDCConfig): Promise<OIDCConfig> {
  if (!caller.orgAdmin) throw denied("changing the format of ID tokens needs the role admin");
  refuseProblems(oidcConfigProblems(config));
  await transact(app, async (tx) => {
    const before = await readOidcConfig(tx, caller.organizationId, true);
    if (sameOidcConfig(before, config)) return;
    const by = { actor: actorOf(caller), auditId: app.newId(), at: app.now() };
    await setOidcConfig(tx, caller.organizationId, config, by);
  });
  return config;
}

/** The format of an organization's ID tokens. */
export const oidcConfig = (app: App) =>
  ({
    async getOIDCConfig({ organizationId }, context) {
      const caller = principal(context);
      ownOrganization(caller, organizationId);
      return { oidcConfig: await readOidcConfig(app.db.point, caller.organizationId) };
    },
    async updateOIDCConfig({ organizationId, oidcConfig = defaultOidcConfig() }, context) {
      const caller = principal(context);
      ownOrganization(caller, organizationId);
      return { oidcConfig: await updateOidcConfig(app, caller, oidcConfig) };
    },
  }) satisfies Partial<ServiceImpl<typeof OrganizationService>>;
