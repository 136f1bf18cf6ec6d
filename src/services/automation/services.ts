import { create } from "@bufbuild/protobuf";
import type { ServiceImpl } from "@connectrpc/connect";
import {
  type CreateServiceRequest,
  type DeleteServiceRequest,
  type EnvironmentAutomationService,
  type Service,
  ServicePhase,
  ServiceSchema,
  type UpdateServiceRequest,
} from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { type App, transact } from "../../app.ts";
import { MAX_SERVICES } from "../../domain/automation.ts";
import { isHalted } from "../../domain/automation-environment.ts";
import {
  acceptServiceStatus,
  isBeingDeleted,
  mergedStatus,
  newService,
  newServiceProblems,
  requestServiceDelete,
  requestServiceStop,
  type ServiceState,
  serviceSecrets,
  serviceStatusProblems,
  settled,
  startRefusal,
  updatedService,
  updateServiceProblems,
} from "../../domain/automation-service.ts";
import { denied, precondition, Refusal, refuseProblems } from "../../domain/errors.ts";
import { closePage, openPage } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import { principal } from "../../rpc/authenticate.ts";
import { holdEnvironmentOf } from "../../store/automation/hold.ts";
import { secretProblems } from "../../store/automation/secrets.ts";
import {
  getService,
  insertService,
  listServices,
  readService,
  removeService,
  type StoredService,
  saveService,
  serviceIn,
  servicesOf,
  startService,
} from "../../store/automation/services.ts";
import { type StoredTask, saveTask, tasksOf } from "../../store/automation/tasks.ts";
import type { Tx } from "../../store/db.ts";
import { getEnvironment, type StoredEnvironment } from "../../store/environments.ts";
import {
  byCaller,
  checkDelete,
  checkEdit,
  checkRoom,
  checkRuns,
  checkSize,
  checkStart,
  checkStop,
  decided,
  subjectOf,
} from "./environment.ts";

const message = ({ id, environmentId, metadata, spec, status }: StoredService): Service =>
  create(ServiceSchema, { id, environmentId, metadata, spec, status });

/**
 * Runs a change of a service whose environment the transaction holds and the caller may read; `work` resolves with
 * whether the runner has to look at it.
 */
async function change(
  app: App,
  caller: Caller,
  id: string,
  work: (tx: Tx, environment: StoredEnvironment, service: StoredService) => Promise<boolean>,
): Promise<Record<string, never>> {
  await transact(app, async (tx, touched) => {
    const environment = await holdEnvironmentOf(tx, caller, "services", id);
    if (await work(tx, environment, await readService(tx, id))) touched(environment.metadata.runnerId);
  });
  return {};
}

async function createService(app: App, caller: Caller, request: CreateServiceRequest): Promise<Service> {
  refuseProblems(newServiceProblems(request));
  const isWanted = request.spec?.desiredPhase === ServicePhase.RUNNING;
  return transact(app, async (tx, touched) => {
    const environment = await getEnvironment(tx, caller, request.environmentId, true);
    checkEdit(environment);
    refuseProblems(await secretProblems(tx, caller, environment, serviceSecrets(request.spec)));
    const state = newService(request, { creator: subjectOf(caller), now: app.now() });
    if (isWanted) checkRuns(environment);
    const reason = isWanted && startRefusal(state);
    if (reason) throw precondition(reason);
    const services = await servicesOf(tx, environment.id);
    const { reference } = state.metadata;
    if (services.some(({ metadata }) => metadata.reference === reference))
      throw new Refusal("already_exists", `the environment already has a service ${reference}`);
    checkRoom(services.length, MAX_SERVICES, "services");
    const service = serviceIn(environment, app.newId(), state);
    const { spec } = service;
    const started: StoredService = isWanted
      ? { ...service, spec: { ...spec, desiredPhase: ServicePhase.RUNNING, session: spec.session || app.newId() } }
      : service;
    if (isWanted) started.startedBy = "manual";
    await insertService(tx, started, byCaller(app, caller));
    await checkSize(tx, environment);
    touched(environment.metadata.runnerId);
    return message(started);
  });
}

/** The status part of an update, judged; undefined where it says that the service is gone. */
function withStatus(
  environment: StoredEnvironment,
  service: StoredService,
  edit: Partial<ServiceState>,
  { status }: UpdateServiceRequest,
): Partial<ServiceState> | undefined {
  if (!status) return edit;
  refuseProblems(serviceStatusProblems(service, status, environment.facts.reportedUrls?.logs ?? ""));
  const move = acceptServiceStatus(service, mergedStatus(service, status), isHalted(environment));
  if (move.kind === "removed") return undefined;
  return { ...edit, status: decided(move)?.status ?? service.status };
}

async function updateService(app: App, caller: Caller, request: UpdateServiceRequest) {
  refuseProblems(updateServiceProblems(request));
  return change(app, caller, request.id, async (tx, environment, service) => {
    const isDefinition = request.metadata !== undefined || request.spec !== undefined;
    if (request.status && !environment.relation.self)
      throw denied("the status of a service is written by its environment alone");
    if (isDefinition || !request.status) checkEdit(environment);
    refuseProblems(await secretProblems(tx, caller, environment, serviceSecrets(request.spec)));
    const { next, problems, refusal } = updatedService(service, request);
    refuseProblems(problems);
    if (isDefinition && refusal) throw precondition(refusal);
    const by = byCaller(app, caller);
    const edit = withStatus(environment, service, isDefinition ? next : {}, request);
    if (!edit) {
      await removeService(tx, service, by);
      return true;
    }
    const state = decided(settled(service, edit));
    if (!state) return false;
    const isRedefined = state.spec !== service.spec || state.metadata !== service.metadata;
    await saveService(tx, service, state, isRedefined ? { ...by, action: "Service updated" } : by);
    if (isRedefined) await checkSize(tx, environment);
    return isRedefined;
  });
}

const dependsOn = (id: string) => (task: StoredTask) => task.dependsOn.includes(id);

async function deleteService(app: App, caller: Caller, { id, force }: DeleteServiceRequest) {
  return change(app, caller, id, async (tx, environment, service) => {
    checkDelete(caller, environment);
    const by = byCaller(app, caller);
    if (!force && isBeingDeleted(service)) return false;
    const dependents = (await tasksOf(tx, environment.id)).filter(dependsOn(service.id));
    if (!force && dependents.length > 0) {
      const references = dependents.map(({ metadata }) => metadata.reference).join(", ");
      throw precondition(`tasks depend on this service: ${references}`);
    }
    for (const task of dependents)
      await saveTask(tx, { ...task, dependsOn: task.dependsOn.filter((each) => each !== service.id) }, by);
    if (force || isHalted(environment)) {
      await removeService(tx, service, { ...by, action: force ? "Service deleted by force" : "Service deleted" });
      return true;
    }
    const state = decided(requestServiceDelete(service));
    if (state) await saveService(tx, service, state, { ...by, action: "Service deletion requested" });
    return state !== undefined;
  });
}

async function stopService(app: App, caller: Caller, id: string) {
  return change(app, caller, id, async (tx, environment, service) => {
    checkStop(caller, environment);
    const state = decided(requestServiceStop(service));
    if (state) await saveService(tx, service, state, { ...byCaller(app, caller), action: "Service stop requested" });
    return state !== undefined;
  });
}

async function start(app: App, caller: Caller, id: string) {
  return change(app, caller, id, async (tx, environment, service) => {
    checkStart(environment);
    const reason = startRefusal(service);
    if (reason) throw precondition(reason);
    return (await startService(tx, service, "manual", byCaller(app, caller))) !== service;
  });
}

/** Long-lived commands of an environment. */
export function services(app: App) {
  return {
    async createService(request, context) {
      return { service: await createService(app, principal(context), request) };
    },
    async getService({ id }, context) {
      return { service: message(await getService(app.db.point, principal(context), id)) };
    },
    async listServices({ pagination, filter }, context) {
      const caller = principal(context);
      const page = openPage(pagination, ["services", caller.id, filter]);
      const { rows, isCut } = await listServices(app.db.list, caller, filter, page);
      const { items, nextToken } = closePage(page, rows, (service) => service.id, isCut);
      return { services: items.map(message), pagination: { nextToken } };
    },
    updateService: (request, context) => updateService(app, principal(context), request),
    deleteService: (request, context) => deleteService(app, principal(context), request),
    startService: ({ id }, context) => start(app, principal(context), id),
    stopService: ({ id }, context) => stopService(app, principal(context), id),
  } satisfies Partial<ServiceImpl<typeof EnvironmentAutomationService>>;
}
