import { ServiceAccountService } from "../../gen/gitpod/v1/service_account_pb.js";
import { section } from "./section.ts";
import { LATER, type World } from "./world.ts";

const one = ({ serviceAccountId }: World) => ({ serviceAccountId });
const token = ({ serviceAccountTokenId }: World) => ({ serviceAccountTokenId });

const TABLE = `
                                  no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  createServiceAccount            U  D  ✓  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listServiceAccounts             U  D  0  ✓  ✓  ✓  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getServiceAccount               U  D  N  ✓  ✓  ✓  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  updateServiceAccount            U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteServiceAccount            U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createServiceAccountAccessToken U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  ✓
  createServiceAccountToken       U  D  D  D  D  D  D  D  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listServiceAccountTokens        U  D  D  D  D  D  D  D  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getServiceAccountToken          U  D  N  N  N  N  ✓  D  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteServiceAccountToken       U  D  N  N  D  N  ✓  D  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
`;

export const serviceAccount = section(ServiceAccountService, TABLE, {
  createServiceAccount: { request: () => ({ name: "made", validUntil: LATER }) },
  listServiceAccounts: { finds: ({ serviceAccountId }) => serviceAccountId },
  getServiceAccount: { request: one },
  updateServiceAccount: { request: (world) => ({ ...one(world), description: "For all" }) },
  deleteServiceAccount: { request: one, fresh: ["serviceAccountId"] },
  createServiceAccountAccessToken: { request: one },
  listServiceAccountTokens: { finds: ({ serviceAccountTokenId }) => serviceAccountTokenId },
  getServiceAccountToken: { request: token },
  deleteServiceAccountToken: { request: token, fresh: ["serviceAccountTokenId"] },
});
