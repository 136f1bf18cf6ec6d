import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { Code } from "@connectrpc/connect";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { type Environment, EnvironmentStatus_Machine_Phase as MachinePhase } from "../gen/gitpod/v1/environment_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import type { BerthClient } from "../src/client.ts";
import { findCaller } from "../src/store/credentials.ts";
import { projectRuntimes } from "../src/store/project-usage.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { createProject, offer, sweep } from "./harness/projects.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { rowsRead } from "./harness/rows-read.ts";
import { addOrganization, connectRunner } from "./harness/tenants.ts";

const MINUTE_MS = 60_000;
const HOUR_MS = 60 * MINUTE_MS;
const DAY_MS = 24 * HOUR_MS;

let plane: TestPlane;
let runner: FakeRunner;
let classId: string;
let member: TestUser;

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  ({ runner, classId } = await connectRunner(plane, { maxEnvironments: 1000 }));
});

// Each test has projects that only its own member and admins see.
beforeEach(async () => {
  member = await plane.addUser();
});

afterAll(async () => {
  await runner[Symbol.asyncDispose]();
  const logged = plane.logged();
  await plane[Symbol.asyncDispose]();
  expect(logged).not.toMatch(/"code":"(internal|unknown)"/);
  expect(logged).not.toContain("failed and will be tried again");
});

const now = () => plane.plane.app.now();

async function project(name: string): Promise<string> {
  const { id } = await createProject(member.client, { name });
  await offer(member.client, id, classId);
  return id;
}

/** An environment of a project that runs from now on, however long nobody uses it. */
async function run(projectId: string): Promise<Environment> {
  const { environment } = await member.client.environments.createEnvironmentFromProject({
    ...{ projectId, spec: { timeout: { disconnected: { seconds: 0n } } } },
  });
  if (!environment) throw new Error("an answer without an environment");
  await runner.reportRunning(environment);
  return environment;
}

const stop = (environment: Environment) =>
  member.client.environments.stopEnvironment({ environmentId: environment.id });

/** Runtimes in minutes, by the name of the project; the clock of the test goes on by itself, but not by a minute. */
async function minutes(start: Date, end: Date, client: BerthClient = member.client): Promise<[string, number][]> {
  const dateRange = { startTime: timestampFromDate(start), endTime: timestampFromDate(end) };
  const { projects } = await client.usage.getTopProjects({ dateRange });
  return projects.map((each) => [each.projectName, Math.round(Number(each.totalRuntimeSeconds) / 60)]);
}

describe("GetTopProjects", () => {
  test("sums what ran within the range, what runs now up to now, the longest first", async () => {
    const start = now();
    const [quiet, busy] = [await project("Quiet"), await project("Busy")];
    await project("Unused");
    const first = await run(busy);
    const second = await run(busy);
    await run(quiet);
    plane.advance(HOUR_MS);
    await stop(first);
    plane.advance(HOUR_MS);
    // The end of the range may lie ahead.
    const end = new Date(now().getTime() + DAY_MS);
    expect(await minutes(start, end)).toEqual([
      ["Busy", 180],
      ["Quiet", 120],
    ]);
    await stop(second);
    plane.advance(2 * HOUR_MS);
    expect(await minutes(start, end)).toEqual([
      ["Quiet", 240],
      ["Busy", 180],
    ]);
    expect(
      await minutes(new Date(start.getTime() + 30 * MINUTE_MS), new Date(start.getTime() + 90 * MINUTE_MS)),
    ).toEqual([
      ["Busy", 90],
      ["Quiet", 60],
    ]);
    expect(await minutes(new Date(start.getTime() - DAY_MS), start)).toEqual([]);
    expect(await minutes(end, new Date(end.getTime() + DAY_MS))).toEqual([]);
  });

  test("an environment that starts anew, or is lost and found, counts by what it ran", async () => {
    const start = now();
    const environment = await run(await project("Restarted"));
    plane.advance(10 * MINUTE_MS);
    await stop(environment);
    await runner.reportMachine(environment, MachinePhase.STOPPED);
    plane.advance(HOUR_MS);
    await member.client.environments.startEnvironment({ environmentId: environment.id });
    const { environment: started } = await member.client.environments.getEnvironment({ environmentId: environment.id });
    await runner.reportRunning(started as Environment);
    plane.advance(20 * MINUTE_MS);
    // Its machine is gone and comes back.
    await runner.reportMachine(started as Environment, MachinePhase.STARTING);
    plane.advance(5 * MINUTE_MS);
    await runner.reportRunning(started as Environment);
    plane.advance(MINUTE_MS);
    expect(await minutes(start, now())).toEqual([["Restarted", 31]]);
  });

  test("outlives the environment, but not the project", async () => {
    const start = now();
    const projectId = await project("Kept");
    const { id: environmentId } = await run(projectId);
    plane.advance(HOUR_MS);
    await member.client.environments.deleteEnvironment({ environmentId, force: true });
    plane.advance(8 * DAY_MS);
    await sweep(plane, "due environments");
    expect(await codeOf(member.client.environments.getEnvironment({ environmentId }))).toBe("NotFound");
    expect(await minutes(start, now())).toEqual([["Kept", 60]]);
    const another = await run(projectId);
    await member.client.projects.deleteProject({ projectId });
    expect(await minutes(start, now())).toEqual([]);
    await sweep(plane, "project deletions");
    plane.advance(HOUR_MS);
    await stop(another);
    expect(await minutes(start, now())).toEqual([]);
  });

  test("shows projects that the caller can see only", async () => {
    const start = now();
    await run(await project("Private"));
    plane.advance(HOUR_MS);
    const other = await plane.addUser();
    const foreign = await plane.addUser({ organizationId: await addOrganization(plane), role: OrganizationRole.ADMIN });
    expect(await minutes(start, now(), other.client)).toEqual([]);
    expect(await minutes(start, now(), foreign.client)).toEqual([]);
    expect((await minutes(start, now(), plane.admin)).map(([name]) => name)).toContain("Private");
  });

  test("pages hold still while environments run on", async () => {
    const start = now();
    for (const name of ["A", "B", "C"]) {
      await run(await project(name));
      plane.advance(MINUTE_MS);
    }
    const dateRange = {
      startTime: timestampFromDate(start),
      endTime: timestampFromDate(new Date(start.getTime() + DAY_MS)),
    };
    const found: string[] = [];
    let token = "";
    do {
      const page = await member.client.usage.getTopProjects({ dateRange, pagination: { pageSize: 1, token } });
      found.push(
        ...page.projects.map((each) => `${each.projectName} ${Math.round(Number(each.totalRuntimeSeconds) / 60)}`),
      );
      token = page.pagination?.nextToken ?? "";
      plane.advance(HOUR_MS);
    } while (token);
    expect(found).toEqual(["A 3", "B 2", "C 1"]);
  });

  test("sums exactly whatever days and parts of days a range has, and however long runs are", async () => {
    const [long, short] = [await project("Long"), await project("Short")];
    const start = now();
    const running = await run(long);
    for (const [hours, pause] of [
      [1, 22],
      [5, 0.5],
      [49.25, 3],
      [0.75, 30],
      [24, 11],
    ] as const) {
      const environment = await run(short);
      plane.advance(hours * HOUR_MS + 1234);
      await stop(environment);
      plane.advance(pause * HOUR_MS);
    }
    await stop(running);
    await run(short);
    plane.advance(40 * HOUR_MS);
    const { app } = plane.plane;
    const runs = await app.db.point<{ name: string; from: Date; to: Date }[]>`
      select name, started_at as from, least(ended_at, ${now()}) as to
      from environment_runs run join projects p on p.id = run.project_id where p.id = any(${[long, short]})`;
    const seconds = (name: string, from: number, to: number) => {
      const parts = runs.filter((each) => each.name === name);
      const ms = parts.map((each) =>
        Math.max(0, Math.min(to, each.to.getTime()) - Math.max(from, each.from.getTime())),
      );
      return Math.floor(ms.reduce((sum, each) => sum + each, 0) / 1000);
    };
    const midnight = Math.ceil(start.getTime() / DAY_MS) * DAY_MS;
    const last = now().getTime();
    const moments = [start.getTime() - DAY_MS, start.getTime() + 1, midnight - 1, midnight, midnight + HOUR_MS];
    moments.push(midnight + DAY_MS, midnight + 2.5 * DAY_MS, midnight + 4 * DAY_MS, last - 3 * DAY_MS, last - 1);
    for (const from of moments) {
      for (const to of moments.filter((each) => each > from)) {
        const dateRange = { startTime: timestampFromDate(new Date(from)), endTime: timestampFromDate(new Date(to)) };
        const { projects } = await member.client.usage.getTopProjects({ dateRange });
        const expected = ["Long", "Short"].map((name) => [name, seconds(name, from, to)] as const);
        expect(
          Object.fromEntries(projects.map((each) => [each.projectName, Number(each.totalRuntimeSeconds)])),
          `${from} to ${to}`,
        ).toEqual(Object.fromEntries(expected.filter(([, sum]) => sum > 0)));
      }
    }
  });

  test("reads days and the runs at the ends of the range, however many runs there were between", async () => {
    const projectId = await project("Many");
    const { app } = plane.plane;
    await app.db.write`
      insert into environment_runs (environment_id, organization_id, project_id, started_at, ended_at)
      select gen_random_uuid(), ${plane.organizationId}, ${projectId}, ${now()}::timestamptz - n * interval '20 minutes',
        ${now()}::timestamptz - n * interval '20 minutes' + interval '1 hour' from generate_series(20, 6000) n`;
    await app.db.write`analyze environment_runs, project_days`;
    const credential = await findCaller(app.db.point, member.token, now());
    if (credential.state !== "ok") throw new Error("the member cannot sign in");
    const range = { start: new Date(now().getTime() - 80 * DAY_MS), end: now() };
    const tables = ["environment_runs", "project_days"];
    const { result, rows } = await rowsRead(app, tables, (sql) =>
      projectRuntimes(sql, credential.caller, range, undefined, 25),
    );
    expect(result.map(({ name }) => name)).toContain("Many");
    expect(rows).toBeGreaterThan(80);
    expect(rows).toBeLessThan(600);
  });

  test("takes ranges of up to 366 days, and no team", async () => {
    const range = (days: number) => ({
      startTime: timestampFromDate(now()),
      endTime: timestampFromDate(new Date(now().getTime() + days * DAY_MS)),
    });
    const { usage } = member.client;
    for (const [days, field] of [
      [0, "date_range.end_time"],
      [-1, "date_range.end_time"],
      [367, "date_range"],
    ] as const) {
      const error = await refusal(usage.getTopProjects({ dateRange: range(days) }));
      expect([Code[error.code], violatedFields(error)]).toEqual(["InvalidArgument", [field]]);
    }
    expect(await codeOf(usage.getTopProjects({}))).toBe("InvalidArgument");
    expect((await usage.getTopProjects({ dateRange: range(365) })).projects).toEqual([]);
    expect(await codeOf(usage.getTopProjects({ dateRange: range(1), teamId: "team" }))).toBe("NotFound");
  });
});
