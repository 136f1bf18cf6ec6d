import { create } from "@bufbuild/protobuf";
import { type SecretScope, SecretScopeSchema, SecretService } from "../../gen/gitpod/v1/secret_pb.js";
import { type Call, section } from "./section.ts";
import { type Fresh, newSecret, type World } from "./world.ts";

const SCOPES = {
  user: ["userId", "userSecretId"],
  project: ["projectId", "projectSecretId"],
  organization: ["organizationId", "organizationSecretId"],
  "service account": ["serviceAccountId", "serviceAccountSecretId"],
} as const satisfies Record<string, [keyof World & SecretScope["scope"]["case"], Fresh]>;

/** The same call for each kind of owner. */
function each(
  rpc: string,
  call: (field: (typeof SCOPES)[keyof typeof SCOPES][0], id: Fresh) => Call,
): Record<string, Call> {
  return Object.fromEntries(Object.entries(SCOPES).map(([name, [field, id]]) => [`${rpc} ${name}`, call(field, id)]));
}

const scopeOf = (field: (typeof SCOPES)[keyof typeof SCOPES][0], world: World) => ({
  case: field,
  value: world[field],
});

const TABLE = `
                                    no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  createSecret user                 U  D  N  D  D  ✓  D  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createSecret project              U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  ✓  D  .  .  .  .  .
  createSecret organization         U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createSecret service account      U  D  N  D  D  D  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  ✓
  createSecret project_id           U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  ✓  D  .  .  .  .  .
  updateSecretValue user            U  D  N  N  D  ✓  N  N  N  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  updateSecretValue project         U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  ✓  D  .  .  .  .  .
  updateSecretValue organization    U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  updateSecretValue service account U  D  N  N  D  N  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  ✓
  listSecrets user                  U  D  N  D  ✓  ✓  D  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listSecrets project               U  D  N  N  ✓  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  ✓  ✓  .  .  .  .  .
  listSecrets organization          U  D  N  ✓  ✓  ✓  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listSecrets service account       U  D  N  D  D  D  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  ✓
  listSecrets                       U  D  0  0  ✓  ✓  0  0  0  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteSecret user                 U  D  N  N  D  ✓  N  N  N  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteSecret project              U  D  N  N  D  ✓  ✓  N  N  D  D  D  D  .  ✓  .  .  .  .  .  ✓  ✓  D  .  .  .  .  .
  deleteSecret organization         U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteSecret service account      U  D  N  N  D  N  ✓  ✓  ✓  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  ✓
  getSecretValue user               U  D  N  N  D  D  N  N  N  D  D  ✓  N  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getSecretValue project            U  D  N  N  D  D  D  N  N  D  D  ✓  N  .  D  .  .  .  .  .  D  D  D  .  .  .  .  .
  getSecretValue organization       U  D  N  D  D  D  D  D  D  D  D  ✓  ✓  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getSecretValue service account    U  D  N  N  N  N  D  D  D  D  D  N  N  .  .  .  .  .  .  .  .  .  .  .  .  .  .  D
`;

export const secret = section(SecretService, TABLE, {
  ...each("createSecret", (field) => ({ request: (world) => newSecret(scopeOf(field, world)) })),
  // As older clients name a project.
  "createSecret project_id": {
    request: ({ projectId }) => ({
      ...newSecret({ case: "projectId", value: projectId }),
      scope: undefined,
      projectId,
    }),
  },
  ...each("updateSecretValue", (_field, id) => ({ request: (world) => ({ secretId: world[id], value: "y" }) })),
  ...each("deleteSecret", (_field, id) => ({ request: (world) => ({ secretId: world[id] }), fresh: [id] })),
  ...each("getSecretValue", (_field, id) => ({ request: (world) => ({ secretId: world[id] }) })),
  ...each("listSecrets", (field, id) => ({
    request: (world) => ({ filter: { scope: create(SecretScopeSchema, { scope: scopeOf(field, world) }) } }),
    finds: (world) => world[id],
  })),
  listSecrets: { finds: ({ userSecretId }) => userSecretId },
});
