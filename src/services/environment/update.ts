import { create } from "@bufbuild/protobuf";
import {
  AdmissionLevel,
  type EnvironmentInitializer,
  EnvironmentPhase,
  EnvironmentSpec_ContentSchema,
  type EnvironmentSpec_Secret,
  type UpdateEnvironmentRequest,
} from "../../../gen/gitpod/v1/environment_pb.js";
import type { OrganizationPolicies } from "../../../gen/gitpod/v1/organization_pb.js";
import { type App, transact } from "../../app.ts";
import { requestUpdate, updateProblems } from "../../domain/environment.ts";
import { denied, refuseProblems } from "../../domain/errors.ts";
import type { Caller } from "../../domain/principal.ts";
import { currentSecrets } from "../../environment-secrets.ts";
import { initializerProblems } from "../../scm/initializer.ts";
import type { Tx } from "../../store/db.ts";
import { getEnvironment, type StoredEnvironment } from "../../store/environments.ts";
import { readPolicies } from "../../store/organizations.ts";
import { findProjectToUse } from "../../store/projects.ts";
import { checkHoldsRepository, checkPolicies, checkRepositories } from "./limits.ts";
import { allow, apply } from "./move.ts";

/** Each part of the request is decided by itself; one that is refused refuses all of it. */
function allowUpdate(caller: Caller, { relation }: StoredEnvironment, { metadata, spec }: UpdateEnvironmentRequest) {
  if (spec) allow(relation.owner || relation.self, "change");
  if (relation.self && (spec?.sshPublicKeys.length || spec?.kernelControlsConfig)) {
    throw denied("an environment may change neither its SSH keys nor its kernel controls");
  }
  if (metadata?.name !== undefined) allow(relation.owner || caller.orgAdmin, "rename");
  if (metadata?.lockdownAt) allow(caller.orgAdmin, "change the lifetime of");
}

/** What a request is about, in words for the audit log. */
function subjects({ metadata, spec }: UpdateEnvironmentRequest): string {
  const named = {
    name: metadata?.name !== undefined,
    lifetime: metadata?.lockdownAt,
    content: spec?.content,
    "SSH keys": spec?.sshPublicKeys.length,
    "dev container": spec?.devcontainer,
    ports: spec?.ports.length,
    timeout: spec?.timeout,
    "automations file": spec?.automationsFile,
    "kernel controls": spec?.kernelControlsConfig,
  };
  return Object.entries(named)
    .flatMap(([name, isNamed]) => (isNamed ? [name] : []))
    .join(", ");
}

/** The secrets of an environment with another initializer: its hosts may be others, and git is to get in there too. */
async function secretsWith(
  app: App,
  tx: Tx,
  stored: StoredEnvironment,
  initializer: EnvironmentInitializer | undefined,
): Promise<EnvironmentSpec_Secret[]> {
  const { spec } = stored;
  if (!initializer || spec.desiredPhase !== EnvironmentPhase.RUNNING) return spec.secrets;
  const content = { ...(spec.content ?? create(EnvironmentSpec_ContentSchema)), initializer };
  return await currentSecrets(app, tx, { ...stored, spec: { ...spec, content } }, true);
}

/** What an environment is made from binds the caller as it does at its creation; what it holds already it may keep. */
async function checkInitializer(
  tx: Tx,
  caller: Caller,
  policies: OrganizationPolicies,
  { metadata, spec }: StoredEnvironment,
  wanted: EnvironmentInitializer,
): Promise<void> {
  const present = spec.content?.initializer;
  if (present?.specs.length) checkHoldsRepository(caller, policies, wanted);
  const project = metadata.projectId ? await findProjectToUse(tx, caller, metadata.projectId) : undefined;
  checkRepositories(caller, policies, wanted, present, project?.message.initializer);
}

/** UpdateEnvironment: applied live where it runs, else at the next start. */
export async function updateEnvironment(app: App, caller: Caller, request: UpdateEnvironmentRequest): Promise<void> {
  const { spec } = request;
  await transact(app, async (tx, touched) => {
    const stored = await getEnvironment(tx, caller, request.environmentId, true);
    allowUpdate(caller, stored, request);
    const where = { schemes: app.config.scm.schemes, field: "spec.content.initializer" };
    const initializer = spec?.content?.initializer;
    refuseProblems([
      ...updateProblems(request, app.now()),
      ...(initializer ? initializerProblems(initializer, where) : []),
    ]);
    const change = requestUpdate(stored, request, app.now(), await secretsWith(app, tx, stored, initializer));
    if (spec && change.kind === "changed") {
      const { policies } = await readPolicies(tx, stored.organizationId);
      // Closing a port is always possible.
      const ports = spec.ports.filter(({ admission }) => admission !== AdmissionLevel.UNSPECIFIED);
      checkPolicies(policies, { ...spec, ports });
      if (initializer) await checkInitializer(tx, caller, policies, stored, initializer);
    }
    if (await apply(app, tx, caller, stored, change, `Environment changed: ${subjects(request)}`))
      touched(stored.metadata.runnerId);
  });
}
