import { randomBytes } from "node:crypto";
import { chmod, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { toBinary } from "@bufbuild/protobuf";
import { v7 as uuidv7 } from "uuid";
import {
  AdmissionLevel,
  type Environment,
  EnvironmentPhase,
  EnvironmentSchema,
} from "../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationPoliciesSchema, OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { UserStatus } from "../gen/gitpod/v1/user_pb.js";
import { type BerthClient, createBerthClient } from "../src/client.ts";
import { MEMBERS_GROUP } from "../src/domain/group.ts";
import { TokenKind, tokenText } from "../src/domain/tokens.ts";
import { type Db, openDb } from "../src/store/db.ts";
import { startEmbeddedPostgres } from "../src/store/embedded-postgres.ts";
import { readPolicies } from "../src/store/organizations.ts";
import { insertToken } from "../src/store/tokens.ts";
import { FakeRunner } from "../test/harness/fake-runner.ts";
import { type Child, startChild } from "./child.ts";
import type { PlaneApi } from "./children/plane.ts";

const HEARTBEAT_MS = 10_000;
const MAX_ENVIRONMENTS = 10_000;

/** Somebody of the organization. */
export interface Person {
  id: string;
  token: string;
}

/** A runner that is connected, and a class of machines on it. */
export interface Place {
  runnerId: string;
  classId: string;
}

/** A control plane in a process of its own, on a database of its own, with a running environment of usual size. */
export interface Stage {
  url: string;
  plane: Child<PlaneApi>;
  databaseUrl: string;
  db: Db;
  dataDir: string;
  admin: BerthClient & Person;
  organizationId: string;
  place: Place;
  environment: Environment;
  /** Size of the environment on the wire. */
  environmentBytes: number;
  /** Another control plane on the same database, in a process of its own; whoever asks for it stops it. */
  replica(): Promise<Child<PlaneApi>>;
  /** As many members, with tokens of their own. */
  people(count: number): Promise<Person[]>;
  /** As many runners that everybody may use. */
  places(count: number): Promise<Place[]>;
  /** Stored copies of the environment, older than it, on a runner that does nothing; returns their ids, oldest first. */
  copies(count: number, creatorId: string): Promise<string[]>;
  /** Throws if a call of the control plane failed since the last time. */
  checkCalls(): Promise<void>;
  close(): Promise<void>;
}

/** What a request to create an environment says, about as much as clients of the product send. */
export function environmentRequest(classId: string) {
  const annotations = Object.fromEntries(
    Array.from({ length: 6 }, (_each, index) => [`example.org/label-${index}`, `value ${index} `.repeat(9).trim()]),
  );
  const remoteUri = `https://git.example.org/${"team/".repeat(4)}project-${"x".repeat(12)}.git`;
  return {
    name: "A project on its main branch",
    annotations,
    spec: {
      machine: { class: classId },
      content: {
        gitEmail: "somebody@example.org",
        gitUsername: "Somebody Else",
        initializer: { specs: [{ spec: { case: "git" as const, value: { remoteUri, cloneTarget: "main" } } }] },
      },
      ports: [3000, 5173, 8080].map((port) => ({
        port,
        name: `web server ${port}`,
        admission: AdmissionLevel.OWNER_ONLY,
      })),
    },
  };
}

async function connectRunner(url: string, admin: BerthClient, exchangeToken: string): Promise<FakeRunner> {
  const { accessToken } = await admin.identity.exchangeToken({ exchangeToken });
  const runner = new FakeRunner(url, accessToken);
  await runner.register({ maxEnvironments: MAX_ENVIRONMENTS });
  runner.watch();
  return runner;
}

async function runningEnvironment(admin: BerthClient, runner: FakeRunner, classId: string): Promise<Environment> {
  const { environment: created } = await admin.environments.createEnvironment(environmentRequest(classId));
  const id = created?.id ?? "";
  await runner.reportRunning(await runner.desired(id));
  const { environment } = await admin.environments.getEnvironment({ environmentId: id });
  if (environment?.status?.phase !== EnvironmentPhase.RUNNING) throw new Error("the environment does not run");
  return environment;
}

async function addPeople(db: Db, organizationId: string, count: number): Promise<Person[]> {
  const at = new Date();
  return Promise.all(
    Array.from({ length: count }, async () => {
      const [id, accountId, token] = [uuidv7(), uuidv7(), tokenText(TokenKind.PERSONAL_ACCESS, randomBytes)];
      await db.begin(async (tx) => {
        await tx`insert into accounts (id, email, email_verified, name, login_provider, created_at)
          values (${accountId}, ${`${id}@example.org`}, true, 'Somebody', 'local', ${at})`;
        await tx`insert into users (id, organization_id, account_id, role, status, member_since)
          values (${id}, ${organizationId}, ${accountId}, ${OrganizationRole.MEMBER}, ${UserStatus.ACTIVE}, ${at})`;
        await tx`insert into group_members (id, group_id, organization_id, member_id, member_principal, created_at)
          select gen_random_uuid(), id, organization_id, ${id}, ${Principal.USER}, ${at} from groups
          where organization_id = ${organizationId} and name = ${MEMBERS_GROUP}`;
        await insertToken(tx, {
          ...{ id: uuidv7(), text: token, kind: TokenKind.PERSONAL_ACCESS, organizationId, createdAt: at },
          ...{ subjectId: id, subjectPrincipal: Principal.USER },
        });
      });
      return { id, token };
    }),
  );
}

/** Nobody runs into the quotas of an organization. */
async function liftQuotas(db: Db, organizationId: string): Promise<void> {
  const { policies } = await readPolicies(db.point, organizationId);
  const lifted = { ...policies, maximumEnvironmentsPerUser: 0n, maximumRunningEnvironmentsPerUser: 0n };
  await db.write`update organizations set policies = ${toBinary(OrganizationPoliciesSchema, lifted)} where id = ${organizationId}`;
}

/** Copies a row of environments as often as asked, with ids from ever longer ago. */
async function copyEnvironment(db: Db, from: { id: string; runnerId: string; creatorId: string }, count: number) {
  const rows = await db.begin(
    (tx) => tx<{ id: string }[]>`
    insert into environments (id, organization_id, creator_id, creator_principal, runner_id, class_id, session_id, role, phase,
      desired_phase, admission, created_at, search, metadata, spec, status, facts)
    select uuidv7(make_interval(secs => -age)), organization_id, ${from.creatorId}, creator_principal, ${from.runnerId}, class_id,
      session_id, role, phase, desired_phase, ${AdmissionLevel.ORGANIZATION}, created_at - make_interval(secs => age), search,
      metadata, spec, status, facts
    from environments, generate_series(${count}::int, 1, -1) as age where id = ${from.id} returning id`,
  );
  await db.write`analyze environments`;
  return rows.map((row) => row.id);
}

/** Starts it; everything it has made is gone after `close`. */
export async function openStage(): Promise<Stage> {
  const folder = await mkdtemp(join(tmpdir(), "berth-bench-"));
  await chmod(folder, 0o711);
  const closing: (() => Promise<unknown>)[] = [() => rm(folder, { recursive: true, force: true })];
  const close = async () => {
    for (const step of closing.splice(0).reverse()) await step();
  };
  try {
    const postgres = await startEmbeddedPostgres(join(folder, "postgres"), () => undefined);
    closing.push(() => postgres.stop());
    const token = tokenText(TokenKind.PERSONAL_ACCESS, randomBytes);
    const dataDir = join(folder, "plane");
    const settings = { databaseUrl: postgres.url, dataDir, adminToken: token };
    const plane = await startChild<PlaneApi>("plane.ts", settings);
    closing.push(() => plane.stop());
    const { url, exchangeToken } = await plane.call("started");
    const db = openDb(postgres.url);
    closing.push(() => db.close());
    const admin = createBerthClient({ baseUrl: url, token });
    const { organizationId, subject } = await admin.identity.getAuthenticatedIdentity({});
    await liftQuotas(db, organizationId);
    const runners = [await connectRunner(url, admin, exchangeToken)];
    const beating = setInterval(() => {
      for (const each of runners) each.heartbeat().catch(() => undefined);
    }, HEARTBEAT_MS);
    closing.push(async () => {
      clearInterval(beating);
      await Promise.all(runners.map((each) => each[Symbol.asyncDispose]()));
    });
    const [runner] = runners as [FakeRunner];
    const { environmentClasses } = await admin.environments.listEnvironmentClasses({
      filter: { canCreateEnvironments: true },
    });
    const place = { runnerId: runner.id, classId: environmentClasses[0]?.id ?? "" };
    const environment = await runningEnvironment(admin, runner, place.classId);
    let failuresBefore = await plane.call("failures");

    const createRunner = async () => {
      const created = await admin.runners.createRunner({ name: "Another host", provider: RunnerProvider.LINUX_HOST });
      const runnerId = created.runner?.runnerId ?? "";
      await db.write`
        insert into role_assignments (id, organization_id, group_id, resource_type, resource_id, resource_role, created_at)
        select gen_random_uuid(), organization_id, id, ${ResourceType.RUNNER}, ${runnerId}, ${ResourceRole.RUNNER_USER}, now()
        from groups where organization_id = ${organizationId} and name = ${MEMBERS_GROUP}`;
      return { runnerId, exchangeToken: created.exchangeToken };
    };
    const addPlace = async (): Promise<Place> => {
      const { runnerId, exchangeToken: credential } = await createRunner();
      runners.push(await connectRunner(url, admin, credential));
      const { configuration } = environmentClasses[0] ?? {};
      const { id: classId } = await admin.runnerConfiguration.createEnvironmentClass({
        ...{ runnerId, displayName: "Standard", description: "As everywhere", configuration },
      });
      return { runnerId, classId };
    };
    const stage: Stage = {
      ...{
        url,
        plane,
        databaseUrl: postgres.url,
        db,
        dataDir: join(folder, "postgres"),
        organizationId,
        place,
        environment,
        close,
      },
      admin: Object.assign(Object.create(admin), { id: subject?.id ?? "", token }) as BerthClient & Person,
      environmentBytes: toBinary(EnvironmentSchema, environment).length,
      replica: () => startChild<PlaneApi>("plane.ts", settings),
      people: (count) => addPeople(db, organizationId, count),
      async places(count) {
        const made: Place[] = [];
        while (made.length < count) made.push(await addPlace());
        return made;
      },
      async copies(count, creatorId) {
        const { runnerId } = await createRunner();
        return copyEnvironment(db, { id: environment.id, runnerId, creatorId }, count);
      },
      async checkCalls() {
        const failures = await plane.call("failures");
        if (failures > failuresBefore) throw new Error(`${failures - failuresBefore} calls failed`);
        failuresBefore = failures;
      },
    };
    return stage;
  } catch (error) {
    await close();
    throw error;
  }
}
