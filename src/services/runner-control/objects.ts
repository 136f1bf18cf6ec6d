import { create } from "@bufbuild/protobuf";
import {
  BookmarkSchema,
  DesiredEnvironmentSchema,
  DesiredServiceSchema,
  DesiredTaskExecutionSchema,
  ObjectKind,
  type Upsert,
  UpsertSchema,
  type WatchResponse,
  WatchResponseSchema,
} from "../../../gen/berth/runner/v1/runner_control_pb.js";
import { ServiceSchema, TaskExecutionSchema } from "../../../gen/gitpod/v1/environment_automation_pb.js";
import type { App } from "../../app.ts";
import { environmentMessage } from "../../domain/environment.ts";
import { deliveredPolicies } from "../../domain/organization-policies.ts";
import { runnerExecutions } from "../../store/automation/executions.ts";
import { runnerServices } from "../../store/automation/services.ts";
import { deletedAmongHeld, runnerEnvironments } from "../../store/environments.ts";
import { readPolicies } from "../../store/organizations.ts";
import { getOwnRunner, readRevisions, runnerMessage, type StoredRunner } from "../../store/runners.ts";

const REVISION_PAGE = 200;
const FIRST = "00000000-0000-0000-0000-000000000000";

type Step = WatchResponse["event"];
export const step = (event: Step): WatchResponse => create(WatchResponseSchema, { event });

export const bookmark = (revision: number): WatchResponse =>
  step({ case: "bookmark", value: create(BookmarkSchema, { revision: BigInt(revision) }) });

/** An object as its runner should have it. */
interface Desired {
  id: string;
  object: Upsert["object"];
}

/** A kind of object of which a runner can have many. */
interface Kind {
  kind: ObjectKind;
  /** How many are read at once: all of them are in memory. */
  page: number;
  /** These objects, or those that follow an id. What is gone is left out. */
  read(app: App, runnerId: string, ids: readonly string[] | undefined, after: string): Promise<Desired[]>;
}

const environments: Kind = {
  kind: ObjectKind.ENVIRONMENT,
  page: 100,
  async read(app, runnerId, ids, after) {
    const found = await runnerEnvironments(app.db.list, runnerId, ids, after, environments.page);
    return found.map(({ environment: { id, ...state }, environmentClass }): Desired => {
      const value = create(DesiredEnvironmentSchema, { environment: environmentMessage(id, state), environmentClass });
      return { id, object: { case: "environment", value } };
    });
  },
};

const services: Kind = {
  kind: ObjectKind.SERVICE,
  page: 50,
  async read(app, runnerId, ids, after) {
    const found = await runnerServices(app.db.list, runnerId, ids, after, services.page);
    return found.map(({ id, environmentId, metadata, spec, status, startedBy }): Desired => {
      const service = create(ServiceSchema, { id, environmentId, metadata, spec, status });
      return { id, object: { case: "service", value: create(DesiredServiceSchema, { service, startedBy }) } };
    });
  },
};

const executions: Kind = {
  kind: ObjectKind.TASK_EXECUTION,
  // Their plans hold commands.
  page: 20,
  async read(app, runnerId, ids, after) {
    const found = await runnerExecutions(app.db.list, runnerId, ids, after, executions.page);
    return found.map(({ id, metadata, spec, status, firingId }): Desired => {
      const taskExecution = create(TaskExecutionSchema, { id, metadata, spec, status });
      const value = create(DesiredTaskExecutionSchema, { taskExecution, firingId });
      return { id, object: { case: "taskExecution", value } };
    });
  },
};

/** In the order in which a snapshot tells them: what others lie in comes first. */
const KINDS: readonly Kind[] = [environments, services, executions];

const upsert = (object: Upsert["object"], revision: number) =>
  step({ case: "upsert", value: create(UpsertSchema, { revision: BigInt(revision), object }) });

const runnerUpsert = (runner: StoredRunner, revision: number) =>
  upsert({ case: "runner", value: runnerMessage(runner) }, revision);

async function policiesUpsert(app: App, runner: StoredRunner, revision: number): Promise<WatchResponse> {
  const { policies } = await readPolicies(app.db.point, runner.organizationId);
  return upsert({ case: "organizationPolicies", value: deliveredPolicies(policies) }, revision);
}

function removal(kind: ObjectKind, id: string, revision: number): WatchResponse {
  const value = { $typeName: "berth.runner.v1.Remove" as const, revision: BigInt(revision), kind, id };
  return step({ case: "remove", value });
}

/** Everything the runner should have. The head is read first: what changes meanwhile comes again as a delta. */
async function* snapshot(app: App, runner: StoredRunner): AsyncGenerator<WatchResponse> {
  const revision = BigInt(runner.headRevision);
  yield step({
    case: "snapshotBegin",
    value: { $typeName: "berth.runner.v1.SnapshotBegin", revision, controlPlaneId: app.controlPlaneId },
  });
  yield runnerUpsert(runner, 0);
  yield await policiesUpsert(app, runner, 0);
  for (const { page, read } of KINDS) {
    for (let after = FIRST; ; ) {
      const found = await read(app, runner.id, undefined, after);
      for (const { object } of found) yield upsert(object, 0);
      if (found.length < page) break;
      after = found.at(-1)?.id ?? after;
    }
  }
  for (const id of await deletedAmongHeld(app.db.list, runner.id)) yield removal(ObjectKind.ENVIRONMENT, id, 0);
  yield step({ case: "snapshotEnd", value: { $typeName: "berth.runner.v1.SnapshotEnd", revision } });
}

interface Changed {
  messages: WatchResponse[];
  revision: number;
  more: boolean;
}

/**
 * Objects that changed after a revision, as they are now; undefined when the log no longer reaches back that far. One
 * that changed several times takes the place of its first change: what lies in it may have changed since, and comes
 * after it.
 */
async function deltas(app: App, runner: StoredRunner, after: number): Promise<Changed | undefined> {
  const read = await readRevisions(app.db.point, runner.id, after, REVISION_PAGE);
  if (!read) return undefined;
  const firsts = new Map<string, (typeof read.revisions)[number]>();
  for (const each of read.revisions) {
    const key = `${each.kind} ${each.objectId}`;
    if (!firsts.has(key)) firsts.set(key, each);
  }
  const changes = [...firsts.values()];
  const objects = new Map<string, Upsert["object"]>();
  for (const { kind, page, read } of KINDS) {
    const ids = changes.filter((each) => each.kind === kind).map(({ objectId }) => objectId);
    for (let from = 0; from < ids.length; from += page) {
      for (const { id, object } of await read(app, runner.id, ids.slice(from, from + page), ""))
        objects.set(`${kind} ${id}`, object);
    }
  }
  const current = changes.some(({ kind }) => kind === ObjectKind.RUNNER)
    ? await getOwnRunner(app.db.point, runner.id)
    : runner;
  const messages: WatchResponse[] = [];
  for (const { kind, objectId, revision } of changes) {
    const object = objects.get(`${kind} ${objectId}`);
    if (kind === ObjectKind.RUNNER) messages.push(runnerUpsert(current, revision));
    else if (kind === ObjectKind.ORGANIZATION_POLICIES) messages.push(await policiesUpsert(app, runner, revision));
    else messages.push(object ? upsert(object, revision) : removal(kind, objectId, revision));
  }
  const revision = read.revisions.at(-1)?.revision ?? after;
  return { messages, revision, more: read.revisions.length === REVISION_PAGE };
}

/** Objects that changed after a revision; everything without one, or when it is too old. */
export async function* changesSince(
  app: App,
  runner: StoredRunner,
  revision: number | undefined,
): AsyncGenerator<WatchResponse, Omit<Changed, "messages">> {
  const changes = revision === undefined ? undefined : await deltas(app, runner, revision);
  if (changes) {
    yield* changes.messages;
    // The messages bear the numbers of first changes; this is how far the picture really goes.
    yield bookmark(changes.revision);
    return changes;
  }
  yield* snapshot(app, runner);
  return { revision: runner.headRevision, more: false };
}
