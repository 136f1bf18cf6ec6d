import { Code, ConnectError } from "@connectrpc/connect";
import { afterEach, beforeEach, expect, test } from "vitest";
import {
  EnvironmentStatus_ContentPhase as ContentPhase,
  type Environment,
  EnvironmentPhase,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../gen/gitpod/v1/environment_pb.js";
import { createBerthClient } from "../src/client.ts";
import type { ControlPlane } from "../src/control-plane.ts";
import { derivePhase } from "../src/domain/lifecycle.ts";
import { lockEnvironment } from "../src/store/environments.ts";
import { sweeps } from "../src/sweep/sweeps.ts";
import { type FakeRunner, runningStatus } from "./harness/fake-runner.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { changePolicies, connectRunner } from "./harness/tenants.ts";

// Random sequences of calls, reports, crashes and moves of the clock, against two replicas over real Postgres. After
// each step every environment has to keep the promises that hold in every state.

const { RUNNING, STOPPED, DELETED, STOPPING, DELETING } = EnvironmentPhase;
const SEEDS = [1, 42];
const STEPS = 100;
const MOST = 4;
const MOST_RUNNING = 2;
const MINUTE_MS = 60_000;
const DAY_MS = 24 * 60 * MINUTE_MS;
/** What a caller may be told; anything else is a mistake of the program. */
const EXPECTED = new Set([Code.FailedPrecondition, Code.ResourceExhausted, Code.Aborted]);
const STEPS_OF_MACHINE = [
  MachinePhase.CREATING,
  MachinePhase.STARTING,
  MachinePhase.RUNNING,
  MachinePhase.STOPPING,
  MachinePhase.STOPPED,
  MachinePhase.DELETING,
  MachinePhase.DELETED,
];

/** A generator of numbers below 1 that gives the same ones for the same seed. */
function mulberry(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

let plane: TestPlane;
let other: ControlPlane;
let member: TestUser;
let runner: FakeRunner;
let classId: string;

beforeEach(async () => {
  plane = await startTestPlane();
  other = await plane.replica();
  member = await plane.addUser();
  await changePolicies(plane, {
    maximumEnvironmentsPerUser: BigInt(MOST),
    maximumRunningEnvironmentsPerUser: BigInt(MOST_RUNNING),
  });
  ({ runner, classId } = await connectRunner(plane));
});

afterEach(async () => {
  await runner[Symbol.asyncDispose]();
  expect(plane.logged()).not.toMatch(/"code":"(internal|unknown)"|failed and will be tried again/);
  await plane[Symbol.asyncDispose]();
});

/** What has been promised about one environment. */
interface Promised {
  id: string;
  /** Its stop or deletion was accepted, and no start since. */
  halted: boolean;
  deleted: boolean;
  spec: bigint;
  status: bigint;
}

async function stored(id: string) {
  const found = await plane.plane.app.db.begin((tx) => lockEnvironment(tx, id));
  const [row] = await plane.plane.app.db.point<{ phase: number; desired_phase: number; due_at: Date | null }[]>`
    select phase, desired_phase, due_at from environments where id = ${id}`;
  return found && row ? { ...found, row } : undefined;
}

async function checkOne(promised: Promised): Promise<void> {
  const found = await stored(promised.id);
  if (!found) {
    expect(promised.deleted).toBe(true);
    return;
  }
  const { spec, status, facts, metadata, row } = found;
  expect(status.phase).toBe(derivePhase(spec, status, facts));
  expect([row.phase, row.desired_phase]).toEqual([status.phase, spec.desiredPhase]);
  if (promised.halted) expect([STOPPED, DELETED]).toContain(spec.desiredPhase);
  if (promised.deleted) expect(spec.desiredPhase).toBe(DELETED);
  if (spec.desiredPhase === DELETED) promised.deleted = true;
  if (spec.desiredPhase === STOPPED) promised.halted = true;
  if (metadata.archivedAt) expect([STOPPED, DELETED]).toContain(spec.desiredPhase);
  expect(spec.specVersion >= promised.spec && status.statusVersion >= promised.status).toBe(true);
  Object.assign(promised, { spec: spec.specVersion, status: status.statusVersion });
}

async function checkQuotas(): Promise<void> {
  const [row] = await plane.plane.app.db.point<{ total: number; running: number }[]>`
    select count(*)::int as total, count(*) filter (where desired_phase = ${RUNNING})::int as running
    from environments where creator_id = ${member.id} and archived_at is null and desired_phase <> ${DELETED}`;
  expect(row?.total).toBeLessThanOrEqual(MOST);
  expect(row?.running).toBeLessThanOrEqual(MOST_RUNNING);
}

const read = async (id: string): Promise<Environment | undefined> =>
  (await member.client.environments.getEnvironment({ environmentId: id })).environment;

/** A report that a runner could send: some phase of the machine, with the parts in one of their ends. */
function reportOf(environment: Environment, random: () => number) {
  const machine = STEPS_OF_MACHINE[Math.floor(random() * STEPS_OF_MACHINE.length)] ?? MachinePhase.RUNNING;
  const status = runningStatus(environment);
  const content =
    random() < 0.15 ? ContentPhase.FAILED : random() < 0.3 ? ContentPhase.INITIALIZING : ContentPhase.READY;
  return {
    ...status,
    machine: { ...status.machine, phase: machine, failureMessage: random() < 0.05 ? "it broke" : "" },
    content: { ...status.content, phase: content },
  };
}

/** What the runner has to do next, done: the way out of every state. */
async function obey(environment: Environment): Promise<void> {
  const { status } = environment;
  if (status?.phase === STOPPING) await runner.reportMachine(environment, MachinePhase.STOPPED);
  else if (status?.phase === DELETING) await runner.reportMachine(environment, MachinePhase.DELETED);
  else await runner.reportRunning(environment);
}

test.each(SEEDS)(
  "no sequence breaks a promise, loses a stop, passes a quota or leaves a state without an exit (%i)",
  async (seed) => {
    const random = mulberry(seed);
    const pick = <T>(items: readonly T[]) => items[Math.floor(random() * items.length)];
    const promised: Promised[] = [];
    const second = createBerthClient({ baseUrl: other.server.url, token: member.token });
    const client = () => (random() < 0.5 ? member.client : second).environments;
    const one = () => pick(promised.filter((each) => !each.deleted))?.id ?? "";

    const calls: Record<string, () => Promise<void>> = {
      async create() {
        const { environment } = await client().createEnvironment({ spec: { machine: { class: classId } } });
        promised.push({ id: environment?.id ?? "", halted: false, deleted: false, spec: 1n, status: 1n });
      },
      async start() {
        const id = one();
        const before = promised.find((each) => each.id === id);
        // Told before the call: a step of somebody else cannot come in between.
        await client().startEnvironment({ environmentId: id });
        if (before) before.halted = false;
        expect((await stored(id))?.status.phase).not.toBe(STOPPED);
      },
      async stop() {
        const id = one();
        await client().stopEnvironment({ environmentId: id });
        const found = promised.find((each) => each.id === id);
        if (found) found.halted = true;
      },
      async archive() {
        await client().archiveEnvironment({ environmentId: one() });
      },
      async unarchive() {
        await client().unarchiveEnvironment({ environmentId: one() });
      },
      async remove() {
        const id = one();
        await client().deleteEnvironment({ environmentId: id, force: random() < 0.3 });
        const found = promised.find((each) => each.id === id);
        if (found) found.deleted = true;
      },
      async use() {
        await client().markEnvironmentActive({ environmentId: one() });
      },
      async change() {
        const session = String(random());
        await client().updateEnvironment({ environmentId: one(), spec: { content: { session } } });
      },
      async storm() {
        // Whatever comes at once is decided one after the other.
        const id = one();
        const environmentId = id;
        const results = await Promise.allSettled([
          member.client.environments.stopEnvironment({ environmentId }),
          second.environments.createEnvironment({ spec: { machine: { class: classId } } }),
          second.environments.startEnvironment({ environmentId }),
          member.client.environments.createEnvironment({ spec: { machine: { class: classId } } }),
        ]);
        for (const result of results) {
          if (result.status === "rejected") expect(EXPECTED).toContain(ConnectError.from(result.reason).code);
          else if ("environment" in result.value && result.value.environment)
            promised.push({ id: result.value.environment.id, halted: false, deleted: false, spec: 1n, status: 1n });
        }
        const found = promised.find((each) => each.id === id);
        if (found) found.halted = false;
      },
      async report() {
        const environment = await read(one());
        if (environment) await runner.report(environment.id, reportOf(environment, random));
      },
      async settle() {
        const environment = await read(one());
        if (environment) await obey(environment);
      },
      async crash() {
        // The runner's process dies and comes back as another link; nothing that it said before counts again.
        await runner.register({ localEnvironmentIds: promised.map(({ id }) => id) });
      },
      async wait() {
        plane.advance(pick([MINUTE_MS, 31 * MINUTE_MS, 61 * MINUTE_MS, 3 * DAY_MS]) ?? 0);
        await Promise.all([plane.plane, other].flatMap(({ app }) => sweeps.map((sweep) => sweep.run(app))));
        await runner.register();
      },
    };
    const weighted = [...Object.keys(calls), "create", "report", "report", "settle", "settle", "start", "stop"];

    for (let step = 0; step < STEPS; step++) {
      const name = promised.some((each) => !each.deleted) ? (pick(weighted) ?? "create") : "create";
      try {
        await calls[name]?.();
      } catch (error) {
        if (!(error instanceof ConnectError)) throw error;
        expect([name, Code[error.code], EXPECTED.has(error.code)]).toEqual([name, Code[error.code], true]);
      }
      for (const each of promised) await checkOne(each);
      await checkQuotas();
    }

    // Whatever state each is in, a stop and a deletion lead out of it.
    for (const each of promised.filter(({ deleted }) => !deleted)) {
      const environmentId = each.id;
      await member.client.environments.stopEnvironment({ environmentId });
      await member.client.environments.deleteEnvironment({ environmentId });
      for (let round = 0; round < 3; round++) {
        const environment = await read(environmentId);
        if (environment && environment.status?.phase !== DELETED) await obey(environment);
      }
      expect((await read(environmentId))?.status?.phase).toBe(DELETED);
    }
  },
);
