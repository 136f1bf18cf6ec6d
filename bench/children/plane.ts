import { setTimeout as delay } from "node:timers/promises";
import { create } from "@bufbuild/protobuf";
import { pino } from "pino";
import { register } from "prom-client";
import { v7 as uuidv7 } from "uuid";
import {
  EnvironmentMetadataSchema,
  EnvironmentSpec_MachineSchema,
  EnvironmentSpecSchema,
} from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { Principal, SubjectSchema } from "../../gen/gitpod/v1/identity_pb.js";
import type { App } from "../../src/app.ts";
import { readServerConfig } from "../../src/config.ts";
import { startControlPlane } from "../../src/control-plane.ts";
import type { Caller } from "../../src/domain/principal.ts";
import { insertEnvironment, readBasis } from "../../src/store/creation.ts";
import { lockEnvironment } from "../../src/store/environments.ts";
import { Topic } from "../../src/store/hub.ts";
import { record } from "../../src/store/record.ts";
import { monotonicMs } from "./clock.ts";
import { serve } from "./serve.ts";

export interface PlaneSettings {
  databaseUrl: string;
  dataDir: string;
  adminToken: string;
}

/** Who creates what where, for inserts without the RPC around them. */
export interface Insertion {
  /** Environment to copy. */
  templateId: string;
  creatorIds: readonly string[];
  /** Classes, each on a runner of its own. */
  classIds: readonly string[];
  clients: number;
  ms: number;
}

export interface PlaneApi {
  started(): { url: string; exchangeToken: string };
  /** Calls that did not end well, since the start. */
  failures(): Promise<number>;
  /** Stores environments with `clients` at once and tells how many a second. */
  insert(insertion: Insertion): Promise<number>;
  /**
   * Commits one status event for each environment, `perSecond` of them a second, and tells when each was committed
   * (monotonic ms).
   */
  emit(environmentIds: readonly string[], perSecond: number, organizationId: string): Promise<number[]>;
}

async function failures(): Promise<number> {
  const metric = await register.getSingleMetric("berth_rpc_seconds")?.get();
  const counts = (metric?.values ?? []) as { value: number; metricName?: string; labels: { code?: string } }[];
  return counts
    .filter(
      ({ metricName, labels }) => metricName?.endsWith("_count") && labels.code !== "ok" && labels.code !== "canceled",
    )
    .reduce((sum, { value }) => sum + value, 0);
}

async function insert({ db }: App, insertion: Insertion): Promise<number> {
  const { templateId, creatorIds, classIds, clients, ms } = insertion;
  const template = await db.begin((tx) => lockEnvironment(tx, templateId));
  if (!template) throw new Error("the environment to copy is gone");
  const { organizationId } = template;
  let done = 0;
  const client = async (index: number) => {
    const id = creatorIds[index % creatorIds.length] ?? "";
    const classId = classIds[index % classIds.length] ?? "";
    const actor = { id, principal: Principal.USER, tokenId: null };
    // Whoever it is has been found to be allowed to.
    const caller = { ...actor, organizationId, orgAdmin: true } as unknown as Caller;
    const { localRunners, found } = await readBasis(db.point, caller, [classId, [], null], new Date());
    if (!found) throw new Error("the class is gone");
    const { runnerId } = found.environmentClass.message;
    const creator = create(SubjectSchema, { id, principal: Principal.USER });
    const spec = create(EnvironmentSpecSchema, {
      ...template.spec,
      machine: create(EnvironmentSpec_MachineSchema, { class: classId }),
    });
    return async () => {
      const at = new Date();
      const metadata = create(EnvironmentMetadataSchema, {
        ...template.metadata,
        ...{ creator, runnerId, sessionId: uuidv7() },
      });
      const state = { ...template, id: uuidv7(), metadata, spec };
      const conditions = { ...{ caller, projectId: "", runnerId, localRunners, most: 0, mostRunning: 0 }, hosts: [] };
      const by = { actor, auditId: uuidv7() };
      const isStored = await db.once((sql) =>
        insertEnvironment(sql, state, { ...conditions, inputs: found.inputs, at }, by),
      );
      if (!isStored) throw new Error("an environment was not stored");
      done += 1;
    };
  };
  const all = await Promise.all(Array.from({ length: clients }, (_each, index) => client(index)));
  const from = performance.now();
  const repeated = async (step: () => Promise<void>) => {
    while (performance.now() - from < ms) await step();
  };
  await Promise.all(all.map(repeated));
  return done / ((performance.now() - from) / 1000);
}

async function emit({ db, hub }: App, environmentIds: readonly string[], perSecond: number, organizationId: string) {
  const from = performance.now();
  const commit = async (resourceId: string, index: number) => {
    await delay(Math.max(0, from + (index * 1000) / perSecond - performance.now()));
    const operation = ResourceOperation.UPDATE_STATUS;
    const resource = { resourceType: ResourceType.ENVIRONMENT, resourceId, environmentId: resourceId };
    await db.begin((tx) => record(tx, { ...resource, organizationId, operation, at: new Date() }));
    const at = monotonicMs();
    hub.wake(Topic.EVENTS);
    return at;
  };
  return Promise.all(environmentIds.map(commit));
}

serve<PlaneSettings, PlaneApi>(async ({ databaseUrl, dataDir, adminToken }) => {
  const config = readServerConfig({
    DATABASE_URL: databaseUrl,
    BERTH_DATA_DIR: dataDir,
    BERTH_BOOTSTRAP_ADMIN_TOKEN: adminToken,
    BERTH_PORT: "0",
    BERTH_RATE_LIMIT: "0",
    BERTH_LOG_LEVEL: "error",
  });
  const plane = await startControlPlane(
    config,
    pino({ level: config.logLevel }, pino.destination({ fd: 2, sync: true })),
  );
  return {
    api: {
      started: () => ({ url: plane.server.url, exchangeToken: plane.runnerExchangeToken ?? "" }),
      failures,
      insert: (insertion) => insert(plane.app, insertion),
      emit: (ids, perSecond, organizationId) => emit(plane.app, ids, perSecond, organizationId),
    },
    stop: () => plane.stop(),
  };
});
