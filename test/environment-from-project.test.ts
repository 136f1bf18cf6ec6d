import { create, type Message, type MessageInitShape } from "@bufbuild/protobuf";
import { Code, type ConnectError } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import {
  AdmissionLevel,
  CreateEnvironmentFromProjectBadRequestEnvironmentClassDetailsSchema,
  type CreateEnvironmentFromProjectRequestSchema,
  type Environment,
  EnvironmentPhase,
  EnvironmentSpec_SecretSchema,
  GitInitializer_CloneTargetMode as Mode,
} from "../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import type { BerthClient } from "../src/client.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { liftQuotas, shareRunner, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { contextUrl, createProject, git, offer, REPOSITORY } from "./harness/projects.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import {
  addClass,
  addOrganization,
  addServiceAccount,
  changePolicies,
  connectRunner,
  share,
} from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

type Request = Omit<
  Exclude<MessageInitShape<typeof CreateEnvironmentFromProjectRequestSchema>, Message>,
  "projectId" | "$typeName"
>;

let plane: TestPlane;
let admin: BerthClient;
let member: TestUser;
let runner: FakeRunner;
let classId: string;
const disposables = new AsyncDisposableStack();

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  admin = plane.admin;
  member = await plane.addUser({ name: "Member" });
  ({ runner, classId } = await connectRunner(plane, { maxEnvironments: 1000 }));
  disposables.use(runner);
});

afterAll(async () => {
  await disposables.disposeAsync();
  const logged = plane.logged();
  await plane[Symbol.asyncDispose]();
  expect(logged).not.toMatch(/"code":"(internal|unknown)"/);
});

async function from(client: BerthClient, projectId: string, request: Request = {}): Promise<Environment> {
  const { environment } = await client.environments.createEnvironmentFromProject({ projectId, ...request });
  if (!environment) throw new Error("an answer without an environment");
  return environment;
}

const inClass = (id: string): Request => ({ spec: { machine: { class: id } } });
const holding = (...specs: (ReturnType<typeof git> | ReturnType<typeof contextUrl>)[]): Request => ({
  spec: { content: { initializer: { specs } } },
});
const setClass = (environmentClassId: string, enabled: boolean) =>
  admin.runnerConfiguration.updateEnvironmentClass({ environmentClassId, enabled });

/** Classes that a refusal names. */
const named = (error: ConnectError) =>
  error
    .findDetails(CreateEnvironmentFromProjectBadRequestEnvironmentClassDetailsSchema)
    .flatMap(({ environmentClassIds }) => environmentClassIds);

/** A project of the member with the class of the shared runner. */
async function usableProject(values: Parameters<typeof createProject>[1] = {}): Promise<string> {
  const { id } = await createProject(member.client, values);
  await offer(member.client, id, classId);
  return id;
}

describe("what an environment is made of", () => {
  test("PLT-34 the request wins field by field, its initializer as a whole", async () => {
    const main = git(REPOSITORY, { cloneTarget: "main", targetMode: Mode.REMOTE_BRANCH });
    const projectId = await usableProject({
      ...{ name: "App", initializer: { specs: [main, git("https://git.example.org/team/tools")] } },
      ...{ devcontainerFilePath: ".devcontainer/app.json", automationsFilePath: "ci/auto.yaml" },
    });
    const plain = await from(member.client, projectId);
    expect(plain.metadata).toMatchObject({ projectId, runnerId: runner.id, originalContextUrl: REPOSITORY });
    expect(plain.metadata?.name).toMatch(/^app-[0-9a-f]{6}$/);
    expect(plain.spec).toMatchObject({
      ...{ machine: { class: classId }, desiredPhase: EnvironmentPhase.RUNNING, ports: [] },
      content: { initializer: { specs: [main, git("https://git.example.org/team/tools")] } },
      devcontainer: { devcontainerFilePath: ".devcontainer/app.json" },
      automationsFile: { automationsFilePath: "ci/auto.yaml" },
    });
    expect(plain.status?.phase).toBe(EnvironmentPhase.CREATING);

    const dev = git(REPOSITORY, { cloneTarget: "dev", targetMode: Mode.REMOTE_BRANCH });
    const changed = await from(member.client, projectId, {
      ...{ name: "Mine", annotations: { a: "b" } },
      spec: {
        content: { initializer: { specs: [dev] }, gitUsername: "Somebody" },
        ports: [{ port: 3000, name: "web", admission: AdmissionLevel.ORGANIZATION }],
        automationsFile: { automationsFilePath: "mine.yaml" },
        timeout: { disconnected: { seconds: 3600n } },
        secrets: [create(EnvironmentSpec_SecretSchema, { id: uuidv7(), name: "FORGED" })],
      },
    });
    expect(changed.metadata).toMatchObject({ name: "Mine", annotations: { a: "b" } });
    expect(changed.spec).toMatchObject({
      ...{ machine: { class: classId }, ports: [{ port: 3000 }], timeout: { disconnected: { seconds: 3600n } } },
      content: { initializer: { specs: [dev] }, gitUsername: "Somebody" },
      devcontainer: { devcontainerFilePath: ".devcontainer/app.json" },
      automationsFile: { automationsFilePath: "mine.yaml" },
      secrets: [],
    });
    const { environments } = await member.client.environments.listEnvironments({ filter: { projectIds: [projectId] } });
    expect(environments.map(({ id }) => id)).toEqual([changed.id, plain.id]);
  });

  test("ENV-6 the branch of the request reaches the runner, not that of the project", async () => {
    runner.watch();
    const branch = (cloneTarget: string) => git(REPOSITORY, { cloneTarget, targetMode: Mode.REMOTE_BRANCH });
    const projectId = await usableProject({ initializer: { specs: [branch("main")] } });
    const { id } = await from(member.client, projectId, holding(branch("dev")));
    expect((await runner.desired(id)).spec?.content?.initializer).toMatchObject({ specs: [branch("dev")] });
  });

  test("an initializer without specs is none: the project's is taken", async () => {
    const projectId = await usableProject();
    const { spec } = await from(member.client, projectId, holding());
    expect(spec?.content?.initializer).toMatchObject({ specs: [git(REPOSITORY)] });
  });

  test("the rules of all environments hold", async () => {
    const projectId = await usableProject();
    const refused = async (request: Request) => {
      const error = await refusal(from(member.client, projectId, request));
      return [Code[error.code], violatedFields(error)];
    };
    expect(await refused({ spec: { desiredPhase: EnvironmentPhase.STOPPED } })).toEqual([
      "InvalidArgument",
      ["spec.desired_phase"],
    ]);
    expect(await refused(inClass("large"))).toEqual(["InvalidArgument", ["spec.machine.class"]]);
    expect(await refused(holding(git("-x")))).toEqual([
      "InvalidArgument",
      ["spec.content.initializer.specs[0].git.remote_uri"],
    ]);
    expect(await refused({ sessionId: uuidv7() })).toEqual(["NotFound", []]);
    await changePolicies(plane, { portSharingDisabled: true });
    const ports = [{ port: 3000, name: "web" }];
    expect((await refused({ spec: { ports } }))[0]).toBe("FailedPrecondition");
    await changePolicies(plane, { portSharingDisabled: false });
  });

  test("a project tells who made environments from it, deleted ones too", async () => {
    const projectId = await usableProject();
    const robot = await addServiceAccount(plane);
    await share(plane, robot.id, { type: ResourceType.PROJECT, id: projectId, role: ResourceRole.PROJECT_USER });
    const { id } = await from(member.client, projectId);
    await from(robot.client, projectId);
    await from(member.client, projectId);
    await member.client.environments.deleteEnvironment({ environmentId: id, force: true });
    const { project } = await member.client.projects.getProject({ projectId });
    expect(project?.usedBy?.totalSubjects).toBe(2);
    expect(project?.usedBy?.subjects.map((each) => each.id)).toEqual([member.id, robot.id]);
  });
});

describe("who may", () => {
  test("whoever has a role on the project and may use a runner of its classes", async () => {
    const projectId = await usableProject();
    const other = await plane.addUser();
    const foreign = await plane.addUser({ organizationId: await addOrganization(plane), role: OrganizationRole.ADMIN });
    expect(await codeOf(from(other.client, projectId))).toBe("NotFound");
    expect(await codeOf(from(foreign.client, projectId))).toBe("NotFound");
    await share(plane, other.id, { type: ResourceType.PROJECT, id: projectId, role: ResourceRole.PROJECT_USER });
    expect((await from(other.client, projectId)).metadata?.creator?.id).toBe(other.id);
    expect((await from(admin, projectId)).metadata?.projectId).toBe(projectId);

    const hidden = await connectRunner(plane, { shared: false });
    disposables.use(hidden.runner);
    await offer(admin, projectId, hidden.classId);
    const error = await refusal(from(other.client, projectId));
    expect(error.findDetails(ActionableErrorDetailsSchema)[0]?.errorCode).toBe("PROJECT_CLASS_NONE_USABLE");
    expect(await codeOf(from(other.client, projectId, inClass(hidden.classId)))).toBe("PermissionDenied");
    await from(admin, projectId);
  });

  test("ENV-4 members who need projects create environments from one, with repositories of it only", async () => {
    const projectId = await usableProject({
      initializer: {
        specs: [
          git(REPOSITORY),
          git("https://github.com/team/Tools.git", { upstreamRemoteUri: "https://github.com/base/tools" }),
        ],
      },
    });
    await changePolicies(plane, { membersRequireProjects: true, disableFromScratch: true });
    try {
      const direct = { spec: { machine: { class: classId }, content: { initializer: { specs: [git(REPOSITORY)] } } } };
      expect(await codeOf(member.client.environments.createEnvironment(direct))).toBe("PermissionDenied");
      await admin.environments.createEnvironment(direct);

      await from(member.client, projectId);
      const own = [
        holding(git("ssh://git@GIT.example.org/team/app")),
        holding(git("git@git.example.org:team/app.git", { cloneTarget: "dev" })),
        holding(contextUrl("https://github.com/Team/tools/pull/7"), git(REPOSITORY)),
        holding(git("https://github.com/base/tools.git")),
        holding(),
      ];
      for (const request of own) await from(member.client, projectId, request);
      const foreign = [
        holding(git("https://git.example.org/team/other")),
        holding(git(REPOSITORY), git("https://git.example.org/team/other")),
        holding(git(REPOSITORY, { upstreamRemoteUri: "https://git.example.org/team/other" })),
        holding(contextUrl("https://github.com/team/other")),
      ];
      for (const request of foreign) {
        const error = await refusal(from(member.client, projectId, request));
        const [detail] = error.findDetails(ActionableErrorDetailsSchema);
        expect([Code[error.code], detail?.errorCode]).toEqual(["PermissionDenied", "members_require_projects"]);
        await from(admin, projectId, request);
      }
    } finally {
      await changePolicies(plane, { membersRequireProjects: false, disableFromScratch: false });
    }
    await from(member.client, projectId, holding(git("https://git.example.org/team/other")));
  });

  test("ENV-4 nor does a member who needs projects get a foreign repository into an environment afterwards", async () => {
    const projectId = await usableProject({ initializer: { specs: [git(REPOSITORY)] } });
    const before = await from(member.client, projectId, holding(git("https://git.example.org/team/before")));
    const ofAdmin = await from(admin, projectId);
    await changePolicies(plane, { membersRequireProjects: true, disableFromScratch: true });
    const update = (client: BerthClient, environmentId: string, ...specs: Parameters<typeof holding>) =>
      client.environments.updateEnvironment({ environmentId, spec: { content: { initializer: { specs } } } });
    const refusedBy = async (environmentId: string, ...specs: Parameters<typeof holding>) => {
      const error = await refusal(update(member.client, environmentId, ...specs));
      return [Code[error.code], error.findDetails(ActionableErrorDetailsSchema)[0]?.errorCode];
    };
    try {
      const { id } = await from(member.client, projectId);
      const other = git("https://git.example.org/team/other");
      expect(await refusedBy(id, other)).toEqual(["PermissionDenied", "members_require_projects"]);
      expect(await refusedBy(id, git(REPOSITORY), other)).toEqual(["PermissionDenied", "members_require_projects"]);
      expect(await refusedBy(id)).toEqual(["PermissionDenied", "disable_from_scratch"]);
      await update(member.client, id, git("ssh://git@GIT.example.org/team/app"));
      // What an environment has held since before the policy stays its own.
      await update(member.client, before.id, git("https://git.example.org/team/before", { cloneTarget: "dev" }));
      await update(member.client, before.id, git(REPOSITORY));
      await update(admin, ofAdmin.id, other);
    } finally {
      await changePolicies(plane, { membersRequireProjects: false, disableFromScratch: false });
    }
  });

  test("nothing is made from a project that is being deleted, and its environments outlive it", async () => {
    const projectId = await usableProject();
    const { id } = await from(member.client, projectId);
    await plane.plane.app.db.begin(async (tx) => {
      await tx`select from projects where id = ${projectId} for key share`;
      await member.client.projects.deleteProject({ projectId });
      const error = await refusal(from(member.client, projectId));
      const [detail] = error.findDetails(ActionableErrorDetailsSchema);
      expect([Code[error.code], detail?.errorCode]).toEqual(["FailedPrecondition", "PROJECT_STATE_DELETING"]);
    });
    await eventually(async () => (await codeOf(from(member.client, projectId))) === "NotFound", "its end");
    const { environment } = await member.client.environments.getEnvironment({ environmentId: id });
    expect(environment?.metadata?.projectId).toBe(projectId);
    await member.client.environments.stopEnvironment({ environmentId: id });
  });

  test("an environment reads the project that it was made from, and no other", async () => {
    const [projectId, other] = [await usableProject(), await usableProject()];
    const { id, spec } = await from(member.client, projectId);
    const machineSession = spec?.machine?.session ?? "";
    const { token } = await runner.control.createEnvironmentToken({ environmentId: id, machineSession });
    const { projects } = plane.client(token);
    expect((await projects.getProject({ projectId })).project?.id).toBe(projectId);
    expect(await codeOf(projects.getProject({ projectId: other }))).toBe("NotFound");
    expect(await codeOf(projects.listProjects({}))).toBe("PermissionDenied");
  });
});

describe("which class", () => {
  test("PLT-33 ENV-5 the first usable one, or the one asked for if the project offers it", async () => {
    const [a, b, c] = [
      await addClass(plane, runner.id),
      await addClass(plane, runner.id),
      await addClass(plane, runner.id),
    ];
    const { id: projectId } = await createProject(member.client);
    await offer(member.client, projectId, a, b);
    const classOf = async (request?: Request) => (await from(member.client, projectId, request)).spec?.machine?.class;
    expect(await classOf()).toBe(a);
    expect(await classOf(inClass(b))).toBe(b);
    for (const asked of [c, uuidv7()]) {
      const error = await refusal(from(member.client, projectId, inClass(asked)));
      expect([Code[error.code], violatedFields(error), named(error)]).toEqual([
        "InvalidArgument",
        ["spec.machine.class"],
        [a, b],
      ]);
    }

    await setClass(a, false);
    expect(await classOf()).toBe(b);
    expect(await codeOf(from(member.client, projectId, inClass(a)))).toBe("FailedPrecondition");
    expect(named(await refusal(from(member.client, projectId, inClass(c))))).toEqual([b]);
    await setClass(b, false);
    const error = await refusal(from(member.client, projectId));
    const [detail] = error.findDetails(ActionableErrorDetailsSchema);
    expect([Code[error.code], detail?.errorCode]).toEqual(["FailedPrecondition", "PROJECT_CLASS_NONE_USABLE"]);
    expect(named(await refusal(from(member.client, projectId, inClass(c))))).toEqual([]);
  });

  test("a project without classes takes any, but one has to be named", async () => {
    const { id: projectId } = await createProject(member.client);
    const error = await refusal(from(member.client, projectId));
    expect([Code[error.code], violatedFields(error)]).toEqual(["InvalidArgument", ["spec.machine.class"]]);
    expect((await from(member.client, projectId, inClass(classId))).spec?.machine?.class).toBe(classId);
    expect(await codeOf(from(member.client, projectId, inClass(uuidv7())))).toBe("NotFound");
  });

  test("ENV-41 a local-runner entry is the newest class of a local runner that the caller may use", async () => {
    const test = await startTestPlane();
    try {
      await liftQuotas(test);
      const user = await test.addUser();
      await using shared = (await connectRunner(test, { shared: false })).runner;
      const newest = await addClass(test, shared.id);
      await addClass(test, shared.id).then((id) =>
        test.admin.runnerConfiguration.updateEnvironmentClass({ environmentClassId: id, enabled: false }),
      );
      const { id: projectId } = await createProject(user.client);
      await offer(user.client, projectId, "local");
      expect(await codeOf(from(user.client, projectId))).toBe("FailedPrecondition");
      expect(await codeOf(from(user.client, projectId, inClass(newest)))).toBe("InvalidArgument");
      await shareRunner(test, shared.id);
      expect((await from(user.client, projectId)).spec?.machine?.class).toBe(newest);
      expect((await from(user.client, projectId, inClass(newest))).metadata?.runnerId).toBe(shared.id);

      // One's own runner comes first, whatever is newer elsewhere.
      const later = await addClass(test, shared.id);
      await test.plane.app.db.write`update runners set creator_id = ${user.id} where id = ${shared.id}`;
      await using other = (await connectRunner(test)).runner;
      expect(other.id).not.toBe(shared.id);
      expect((await from(user.client, projectId)).spec?.machine?.class).toBe(later);

      await changePolicies(test, { allowLocalRunners: false });
      const off = await refusal(from(user.client, projectId));
      expect(off.findDetails(ActionableErrorDetailsSchema)[0]?.errorCode).toBe("PROJECT_CLASS_NONE_USABLE");
      const named = await refusal(from(user.client, projectId, inClass(later)));
      expect(named.findDetails(ActionableErrorDetailsSchema)[0]?.errorCode).toBe("allow_local_runners");
    } finally {
      await test[Symbol.asyncDispose]();
    }
  });
});
