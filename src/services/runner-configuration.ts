import { clone, create, equals, type MessageInitShape } from "@bufbuild/protobuf";
import type { ServiceImpl } from "@connectrpc/connect";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import {
  type CreateEnvironmentClassRequest,
  type EnvironmentClass,
  EnvironmentClassSchema,
  type FieldValue,
  type ListEnvironmentClassesRequest,
  type ListEnvironmentClassesResponseSchema,
  RunnerConfigurationService,
  RunnerKind,
  RunnerProvider,
  type UpdateEnvironmentClassRequest,
} from "../../gen/gitpod/v1/runner_configuration_pb.js";
import { RunnerPhase } from "../../gen/gitpod/v1/runner_pb.js";
import { type App, actorOf, transact } from "../app.ts";
import { scmOnlySchema, validateConfiguration } from "../domain/environment-class.ts";
import { denied, type FieldProblem, precondition, refuseProblems } from "../domain/errors.ts";
import { closePage, openPage } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { withPending } from "../pending.ts";
import { principal } from "../rpc/authenticate.ts";
import { getClass, insertClass, listClasses, updateClass } from "../store/environment-classes.ts";
import { readPolicies } from "../store/organizations.ts";
import { type Change, record } from "../store/record.ts";
import { getRunner, type StoredRunner } from "../store/runners.ts";
import {
  changeHostToken,
  createHostToken,
  pageOfHostTokens,
  readHostToken,
  removeHostToken,
} from "./runner-configuration/host-tokens.ts";
import {
  changeIntegration,
  createIntegration,
  pageOfIntegrations,
  readIntegration,
  removeIntegration,
} from "./runner-configuration/integrations.ts";
import { callbackUrl, publishedSchema } from "./runner-configuration/schema.ts";

/** A runner without a schema takes any keys, as long as each is given once. */
function configurationProblems(app: App, runner: StoredRunner, configuration: readonly FieldValue[]): FieldProblem[] {
  const checked = runner.configurationSchema || runner.provider === RunnerProvider.LINUX_HOST;
  if (checked) return validateConfiguration(publishedSchema(app, runner), configuration);
  const keys = configuration.map(({ key }) => key);
  return keys.flatMap((key, index) =>
    keys.indexOf(key) === index ? [] : [{ field: `configuration[${index}].key`, message: "is given twice" }],
  );
}

function changeOf(
  app: App,
  caller: Caller,
  message: EnvironmentClass,
  operation: ResourceOperation,
  action: string,
): Change {
  return {
    organizationId: caller.organizationId,
    resourceType: ResourceType.ENVIRONMENT_CLASS,
    resourceId: message.id,
    operation,
    runnerId: message.runnerId,
    at: app.now(),
    audit: { id: app.newId(), actor: actorOf(caller), action },
  };
}

async function createClass(app: App, caller: Caller, request: CreateEnvironmentClassRequest): Promise<string> {
  const { runnerId, displayName, description, configuration } = request;
  return transact(app, async (tx) => {
    const runner = await getRunner(tx, caller, runnerId, true);
    if (!runner.administers) throw denied("creating a class needs the role admin on its runner");
    if (runner.kind === RunnerKind.LOCAL_CONFIGURATION)
      throw precondition("the local configuration runner has no environments");
    if (runner.phase === RunnerPhase.DELETING) throw precondition("the runner is being deleted");
    refuseProblems(configurationProblems(app, runner, configuration));
    const message = create(EnvironmentClassSchema, {
      id: app.newId(),
      runnerId,
      displayName,
      description,
      configuration,
      enabled: true,
    });
    await insertClass(
      tx,
      { message, organizationId: caller.organizationId, fits: true },
      changeOf(app, caller, message, ResourceOperation.CREATE, "Environment class created"),
    );
    return message.id;
  });
}

async function updateEnvironmentClass(app: App, caller: Caller, request: UpdateEnvironmentClassRequest): Promise<void> {
  await transact(app, async (tx) => {
    const stored = await getClass(tx, caller, request.environmentClassId, true);
    if (!stored.administers) throw denied("changing a class needs the role admin on its runner");
    if (stored.runnerPhase === RunnerPhase.DELETING) throw precondition("the runner is being deleted");
    const next = clone(EnvironmentClassSchema, stored.message);
    next.displayName = request.displayName ?? next.displayName;
    next.description = request.description ?? next.description;
    next.enabled = request.enabled ?? next.enabled;
    if (equals(EnvironmentClassSchema, next, stored.message)) return;
    await updateClass(tx, next);
    await record(tx, changeOf(app, caller, next, ResourceOperation.UPDATE, "Environment class changed"));
  });
}

async function listEnvironmentClasses(
  app: App,
  caller: Caller,
  request: ListEnvironmentClassesRequest,
): Promise<MessageInitShape<typeof ListEnvironmentClassesResponseSchema>> {
  const page = openPage(request.pagination, ["environment classes", caller.id, request.filter]);
  const { localRunners } = await readPolicies(app.db.point, caller.organizationId);
  const rows = await listClasses(app.db.list, caller, request.filter, localRunners, page);
  const { items, nextToken } = closePage(page, rows, (each) => each.id);
  return { environmentClasses: items, pagination: { nextToken } };
}

/** RunnerConfigurationService, as far as it is built. */
export function runnerConfigurationService(app: App): ServiceImpl<typeof RunnerConfigurationService> {
  return withPending(RunnerConfigurationService, ["validateRunnerConfiguration"], {
    async createEnvironmentClass(request, context) {
      return { id: await createClass(app, principal(context), request) };
    },
    async getEnvironmentClass(request, context) {
      return {
        environmentClass: (await getClass(app.db.point, principal(context), request.environmentClassId)).message,
      };
    },
    listEnvironmentClasses: (request, context) => listEnvironmentClasses(app, principal(context), request),
    async updateEnvironmentClass(request, context) {
      await updateEnvironmentClass(app, principal(context), request);
      return {};
    },
    async createHostAuthenticationToken(request, context) {
      return { token: await createHostToken(app, principal(context), request) };
    },
    async getHostAuthenticationToken(request, context) {
      return { token: await readHostToken(app, principal(context), request.id) };
    },
    listHostAuthenticationTokens: (request, context) => pageOfHostTokens(app, principal(context), request),
    async updateHostAuthenticationToken(request, context) {
      await changeHostToken(app, principal(context), request);
      return {};
    },
    async deleteHostAuthenticationToken(request, context) {
      await removeHostToken(app, principal(context), request.id);
      return {};
    },
    async createSCMIntegration(request, context) {
      return { id: await createIntegration(app, principal(context), request) };
    },
    async getSCMIntegration(request, context) {
      return { integration: await readIntegration(app, principal(context), request.id) };
    },
    listSCMIntegrations: (request, context) => pageOfIntegrations(app, principal(context), request),
    async updateSCMIntegration(request, context) {
      await changeIntegration(app, principal(context), request);
      return {};
    },
    async deleteSCMIntegration(request, context) {
      await removeIntegration(app, principal(context), request.id);
      return {};
    },
    async getRunnerConfigurationSchema(request, context) {
      const runner = await getRunner(app.db.point, principal(context), request.runnerId);
      const schema = publishedSchema(app, runner);
      return { schema: runner.kind === RunnerKind.LOCAL_CONFIGURATION ? scmOnlySchema(callbackUrl(app)) : schema };
    },
  });
}
