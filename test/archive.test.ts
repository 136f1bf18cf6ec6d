import { durationFromMs, timestampDate } from "@bufbuild/protobuf/wkt";
import { afterEach, beforeEach, expect, test } from "vitest";
import { EnvironmentPhase, EnvironmentStatus_Machine_Phase as MachinePhase } from "../gen/gitpod/v1/environment_pb.js";
import type { ControlPlane } from "../src/control-plane.ts";
import { dueArchives, dueDeletions } from "../src/sweep/archive.ts";
import { getEnvironment } from "./harness/environments.ts";
import { type FakeRunner, runningStatus } from "./harness/fake-runner.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { changePolicies, connectRunner } from "./harness/tenants.ts";

const DAY_MS = 24 * 60 * 60_000;
const MINUTE_MS = 60_000;

let plane: TestPlane;
let replica: ControlPlane;
let member: TestUser;
let runner: FakeRunner;
let classId: string;

beforeEach(async () => {
  plane = await startTestPlane();
  replica = await plane.replica();
  member = await plane.addUser();
  ({ runner, classId } = await connectRunner(plane));
});

afterEach(async () => {
  await runner[Symbol.asyncDispose]();
  expect(plane.logged()).not.toMatch(/failed and will be tried again/);
  await plane[Symbol.asyncDispose]();
});

const read = (id: string) => getEnvironment(member.client, id);

async function machineIs(id: string, phase: MachinePhase): Promise<void> {
  await runner.report(id, { ...runningStatus(await read(id)), machine: { phase } });
}

/** An environment that has run and was stopped. */
async function stopped(): Promise<string> {
  const { environment } = await member.client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  const id = environment!.id;
  await runner.reportRunning(environment!);
  await member.client.environments.stopEnvironment({ environmentId: id });
  await machineIs(id, MachinePhase.STOPPED);
  expect((await read(id)).status?.phase).toBe(EnvironmentPhase.STOPPED);
  return id;
}

/** What the sweeps do on two replicas at once. */
const sweep = () =>
  Promise.all([plane.plane, replica].flatMap(({ app }) => [dueArchives.run(app), dueDeletions.run(app)]));

async function actions(id: string): Promise<string[]> {
  const { point } = plane.plane.app.db;
  const rows = await point<{ action: string }[]>`select action from audit_log where subject_id = ${id} order by id`;
  return rows.map((row) => row.action);
}

test("ENV-19 stopped for three days is archived, once, and without a policy never deleted", async () => {
  const id = await stopped();
  plane.advance(3 * DAY_MS - MINUTE_MS);
  await sweep();
  expect((await read(id)).metadata?.archivedAt).toBeUndefined();
  plane.advance(MINUTE_MS);
  await sweep();
  const archivedAt = (await read(id)).metadata?.archivedAt;
  expect(archivedAt && timestampDate(archivedAt) <= plane.plane.app.now()).toBe(true);
  plane.advance(400 * DAY_MS);
  await sweep();
  expect((await read(id)).status?.phase).toBe(EnvironmentPhase.STOPPED);
  expect((await actions(id)).filter((action) => action.startsWith("Environment archived"))).toHaveLength(1);
});

test("ENV-19 with a delete policy it is deleted that long after its archival; 0 means never", async () => {
  const id = await stopped();
  plane.advance(3 * DAY_MS);
  await sweep();
  plane.advance(7 * DAY_MS);
  await sweep();
  expect((await read(id)).spec?.desiredPhase).toBe(EnvironmentPhase.STOPPED);
  // Read when it is applied: it holds for what is archived already.
  await changePolicies(plane, { deleteArchivedEnvironmentsAfter: durationFromMs(7 * DAY_MS) });
  await sweep();
  const deleting = await read(id);
  expect([deleting.spec?.desiredPhase, deleting.status?.phase]).toEqual([
    EnvironmentPhase.DELETED,
    EnvironmentPhase.DELETING,
  ]);
  await sweep();
  expect((await actions(id)).filter((action) => action.includes("archived for a long time"))).toHaveLength(1);
});

test("a longer delay holds it back, and taking it out of the archive starts the time anew", async () => {
  await changePolicies(plane, { archiveEnvironmentsAfter: durationFromMs(10 * DAY_MS) });
  const id = await stopped();
  plane.advance(9 * DAY_MS);
  await sweep();
  expect((await read(id)).metadata?.archivedAt).toBeUndefined();
  plane.advance(DAY_MS);
  await sweep();
  expect((await read(id)).metadata?.archivedAt).toBeDefined();
  await member.client.environments.unarchiveEnvironment({ environmentId: id });
  plane.advance(9 * DAY_MS);
  await sweep();
  expect((await read(id)).metadata?.archivedAt).toBeUndefined();
  plane.advance(DAY_MS);
  await sweep();
  expect((await read(id)).metadata?.archivedAt).toBeDefined();
});

test("what runs is never archived", async () => {
  const { environment } = await member.client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  await runner.reportRunning(environment!);
  const archived = await stopped();
  plane.advance(3 * DAY_MS);
  await sweep();
  expect((await read(environment!.id)).metadata?.archivedAt).toBeUndefined();
  expect((await read(archived)).metadata?.archivedAt).toBeDefined();
});

test("a look reads rows that are due through an index, however many are not", async () => {
  await stopped();
  const { db } = plane.plane.app;
  const plans = await db.write.begin(async (tx) => {
    await tx`set local enable_seqscan = off`;
    const archive = await tx`explain select id from environments
      where organization_id = ${plane.organizationId} and archivable_since <= now() order by archivable_since limit 50`;
    const deletion = await tx`explain select id from environments
      where organization_id = ${plane.organizationId} and archived_at <= now() and desired_phase <> 80
      order by archived_at limit 50`;
    return [archive, deletion].map((rows) => rows.map((row) => row["QUERY PLAN"]).join("\n"));
  });
  expect(plans[0]).toContain("environments_archivable");
  expect(plans[1]).toContain("environments_deletable");
});
