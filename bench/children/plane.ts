import { setTimeout as delay } from "node:timers/promises";
import { create } from "@bufbuild/protobuf";
import { pino } from "pino";
import { register } from "prom-client";
import { v7 as uuidv7 } from "uuid";
import { EnvironmentMetadataSchema } from "../../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { Principal, SubjectSchema } from "../../gen/gitpod/v1/identity_pb.js";
import type { App } from "../../src/app.ts";
import { readServerConfig } from "../../src/config.ts";
import { startControlPlane } from "../../src/control-plane.ts";
import { insertEnvironment, lockEnvironment } from "../../src/store/environments.ts";
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
  runnerIds: readonly string[];
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
  const { templateId, creatorIds, runnerIds, clients, ms } = insertion;
  const template = await db.begin((tx) => lockEnvironment(tx, templateId));
  if (!template) throw new Error("the environment to copy is gone");
  let done = 0;
  const from = performance.now();
  const client = async (index: number) => {
    const creatorId = creatorIds[index % creatorIds.length] ?? "";
    const actor = { id: creatorId, principal: Principal.USER, tokenId: null };
    const creator = create(SubjectSchema, { id: creatorId, principal: Principal.USER });
    const runnerId = runnerIds[index % runnerIds.length] ?? "";
    while (performance.now() - from < ms) {
      const metadata = create(EnvironmentMetadataSchema, {
        ...template.metadata,
        creator,
        runnerId,
        sessionId: uuidv7(),
      });
      const state = { ...template, id: uuidv7(), metadata };
      await db.begin((tx) => insertEnvironment(tx, state, actor, uuidv7(), new Date()));
      done += 1;
    }
  };
  await Promise.all(Array.from({ length: clients }, (_each, index) => client(index)));
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
