import { create, toBinary } from "@bufbuild/protobuf";
import { Code } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { CountResponseRelation } from "../gen/gitpod/v1/count_pb.js";
import { GitInitializer_CloneTargetMode as Mode } from "../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { SortOrder } from "../gen/gitpod/v1/pagination_pb.js";
import { ProjectPhase, ProjectPrebuildConfigurationSchema } from "../gen/gitpod/v1/project_pb.js";
import { RunnerKind } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { SecretSchema } from "../gen/gitpod/v1/secret_pb.js";
import type { BerthClient } from "../src/client.ts";
import { MAX_PROJECTS } from "../src/domain/project.ts";
import { Scope } from "../src/domain/secret.ts";
import { eventText, watchEvents } from "./harness/event-stream.ts";
import { type FakeRunner, runningStatus } from "./harness/fake-runner.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { contextUrl, createProject, git, offer, REPOSITORY, sweep, traces } from "./harness/projects.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { addOrganization, addServiceAccount, changePolicies, connectRunner, share } from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

const { CREATE, UPDATE, DELETE } = ResourceOperation;
const { PROJECT } = ResourceType;

let plane: TestPlane;
let admin: BerthClient;
let member: TestUser;
let other: TestUser;
let runner: FakeRunner;
let classId: string;

beforeAll(async () => {
  plane = await startTestPlane();
  await liftQuotas(plane);
  admin = plane.admin;
  member = await plane.addUser({ name: "Member" });
  other = await plane.addUser({ name: "Other" });
  ({ runner, classId } = await connectRunner(plane));
});

afterAll(async () => {
  await runner[Symbol.asyncDispose]();
  const logged = plane.logged();
  await plane[Symbol.asyncDispose]();
  expect(logged).not.toMatch(/"code":"(internal|unknown)"/);
  expect(logged).not.toContain("failed and will be tried again");
});

const read = async (client: BerthClient, projectId: string) =>
  (await client.projects.getProject({ projectId })).project;
const shareProject = (user: TestUser, id: string, role: ResourceRole) =>
  share(plane, user.id, { type: ResourceType.PROJECT, id, role });

/** Error code of a refusal for people, with the code of the call. */
function actionableCode(error: Awaited<ReturnType<typeof refusal>>): string {
  const [detail] = error.findDetails(ActionableErrorDetailsSchema);
  expect(detail?.userMessage).not.toBe("");
  return `${Code[error.code]} ${detail?.errorCode}`;
}

describe("CreateProject", () => {
  test("stores what was sent, and shows the description once", async () => {
    const initializer = {
      specs: [
        git("https://Git.Example.org/Team/App.git/", { cloneTarget: "main", targetMode: Mode.REMOTE_BRANCH }),
        git("git@git.example.org:team/tools", { checkoutLocation: "tools" }),
      ],
    };
    const created = await createProject(member.client, {
      ...{ name: " The app ", initializer, devcontainerFilePath: ".devcontainer/a.json" },
      ...{ automationsFilePath: "ci/automations.yaml", technicalDescription: "What it is" },
    });
    expect(created.technicalDescription).toBe("What it is");
    expect(created.initializer).toMatchObject(initializer);
    expect(created.metadata).toMatchObject({
      ...{ organizationId: plane.organizationId, name: " The app " },
      creator: { id: member.id, principal: Principal.USER },
    });
    expect(created.metadata?.createdAt).toEqual(created.metadata?.updatedAt);
    expect(created.desiredPhase).toBe(ProjectPhase.ACTIVE);
    expect([created.environmentClasses, created.environmentClass]).toEqual([[], undefined]);
    expect(created.prebuildConfiguration).toBeUndefined();
    expect(await read(member.client, created.id)).toEqual({ ...created, technicalDescription: "" });
    const { projects } = await member.client.projects.listProjects({ filter: { projectIds: [created.id] } });
    expect(projects).toEqual([{ ...created, technicalDescription: "" }]);
    expect(await traces(plane, created.id)).toEqual({ events: [[PROJECT, CREATE]], actions: ["Project created"] });
  });

  test.each([
    ["no spec", { initializer: { specs: [] } }, "initializer.specs"],
    [
      "11 specs",
      { initializer: { specs: Array.from({ length: 11 }, (_, i) => git(`${REPOSITORY}${i}`)) } },
      "initializer.specs",
    ],
    ["a remote helper", { initializer: { specs: [git("ext::sh -c id")] } }, "initializer.specs[0].git.remote_uri"],
    [
      "a password",
      { initializer: { specs: [git("https://u:p@git.example.org/a/b")] } },
      "initializer.specs[0].git.remote_uri",
    ],
    ["a blank name", { name: "  " }, "name"],
    ["a way out", { devcontainerFilePath: "a/../../b" }, "devcontainer_file_path"],
    ["a backslash", { automationsFilePath: "a\\b" }, "automations_file_path"],
    ["an absolute path", { automationsFilePath: "/etc/passwd" }, "automations_file_path"],
    ["a long path", { automationsFilePath: "a".repeat(1025) }, "automations_file_path"],
  ])("%s is INVALID_ARGUMENT", async (_, values, field) => {
    const error = await refusal(createProject(member.client, values));
    expect([Code[error.code], violatedFields(error)]).toEqual(["InvalidArgument", [field]]);
  });

  test("PLT-28 members create projects unless policy forbids it", async () => {
    await changePolicies(plane, { membersCreateProjects: false });
    const projectsAdmin = await plane.addUser();
    await shareOrganizationRole(projectsAdmin.id, ResourceRole.ORG_PROJECTS_ADMIN);
    try {
      const refused = await refusal(createProject(member.client));
      expect(actionableCode(refused)).toBe("PermissionDenied members_create_projects");
      const projects = [{ name: "App", initializer: { specs: [git(REPOSITORY)] } }];
      expect(actionableCode(await refusal(member.client.projects.createProjects({ projects })))).toBe(
        "PermissionDenied members_create_projects",
      );
      const { client } = await addServiceAccount(plane);
      expect(await codeOf(createProject(client))).toBe("PermissionDenied");
      await createProject(admin);
      await createProject(projectsAdmin.client);
    } finally {
      await changePolicies(plane, { membersCreateProjects: true });
    }
    await createProject(member.client);
  });

  test("PLT-30 prebuilds may name classes that the project does not offer, as long as they exist", async () => {
    const prebuildConfiguration = {
      ...{ enabled: true, environmentClassIds: [classId], timeout: { seconds: 300n }, enableJetbrainsWarmup: true },
      trigger: { trigger: { case: "dailySchedule" as const, value: { hourUtc: 3 } } },
      executor: { id: member.id, principal: Principal.USER },
    };
    const { id } = await createProject(member.client, { prebuildConfiguration });
    expect((await read(member.client, id))?.prebuildConfiguration).toEqual(
      create(ProjectPrebuildConfigurationSchema, prebuildConfiguration),
    );

    const robot = await addServiceAccount(plane);
    const hidden = await connectRunner(plane, { shared: false });
    const attempt = (changes: object) =>
      refusal(createProject(member.client, { prebuildConfiguration: { ...prebuildConfiguration, ...changes } }));
    expect(Code[(await attempt({ environmentClassIds: [uuidv7()] })).code]).toBe("NotFound");
    expect(Code[(await attempt({ environmentClassIds: [hidden.classId] })).code]).toBe("NotFound");
    const someone = { id: other.id, principal: Principal.USER };
    expect(Code[(await attempt({ executor: someone })).code]).toBe("PermissionDenied");
    const unknown = { id: uuidv7(), principal: Principal.SERVICE_ACCOUNT };
    expect(Code[(await attempt({ executor: unknown })).code]).toBe("NotFound");
    const nobody = { id: runner.id, principal: Principal.RUNNER };
    expect(violatedFields(await attempt({ executor: nobody }))).toEqual(["prebuild_configuration.executor"]);
    const executor = { id: robot.id, principal: Principal.SERVICE_ACCOUNT };
    await createProject(member.client, { prebuildConfiguration: { ...prebuildConfiguration, executor } });
    await hidden.runner[Symbol.asyncDispose]();
  });

  test("an organization has a limit of projects, also for those that come at the same time", async () => {
    const { db } = plane.plane.app;
    const filler = "Filler of the limit";
    await db.write`
      insert into projects (id, organization_id, creator_id, creator_principal, name, search, remote_uris, repositories, message,
        technical_description, popularity_due_at, created_at)
      select gen_random_uuid(), ${plane.organizationId}, ${other.id}, ${Principal.USER}, ${filler}, '', '{}', '{}', '', '',
        now() + interval '1 year', now()
      from generate_series(2, ${MAX_PROJECTS}::int - (select count(*)::int from projects))`;
    const attempts = await Promise.allSettled(Array.from({ length: 4 }, () => createProject(member.client)));
    expect(attempts.filter(({ status }) => status === "fulfilled")).toHaveLength(1);
    const error = await refusal(createProject(member.client));
    expect(actionableCode(error)).toBe("ResourceExhausted PLATFORM_LIMIT_QUOTA");
    expect(error.metadata.get("x-should-retry")).toBe("false");
    await db.write`delete from projects where name = ${filler}`;
    await createProject(member.client);
  });
});

describe("who sees and changes a project", () => {
  test("PLT-19 another organization sees none of it", async () => {
    const { id: projectId } = await createProject(member.client);
    const { client } = await plane.addUser({
      organizationId: await addOrganization(plane),
      role: OrganizationRole.ADMIN,
    });
    expect(await codeOf(client.projects.getProject({ projectId }))).toBe("NotFound");
    expect(await codeOf(client.projects.updateProject({ projectId, name: "Mine" }))).toBe("NotFound");
    expect(await codeOf(client.projects.deleteProject({ projectId }))).toBe("NotFound");
    expect(await codeOf(client.projects.listProjectEnvironmentClasses({ projectId }))).toBe("NotFound");
    expect((await client.projects.listProjects({ filter: { projectIds: [projectId] } })).projects).toEqual([]);
  });

  test("roles on it: users read, editors change, admins delete", async () => {
    const { id: projectId } = await createProject(member.client);
    const { projects } = other.client;
    const outcomes = async () => [
      await outcome(projects.getProject({ projectId })),
      await outcome(projects.listProjectEnvironmentClasses({ projectId })),
      await outcome(projects.updateProject({ projectId, name: "App" })),
      await outcome(
        projects.updateProjectEnvironmentClasses({
          projectId,
          projectEnvironmentClasses: [{ order: 0, environmentClass: { case: "localRunner", value: true } }],
        }),
      ),
      await outcome(projects.deleteProject({ projectId })),
    ];
    expect(await outcomes()).toEqual(["NotFound", "NotFound", "NotFound", "NotFound", "NotFound"]);
    const takeUser = await shareProject(other, projectId, ResourceRole.PROJECT_USER);
    expect(await outcomes()).toEqual(["ok", "ok", "PermissionDenied", "PermissionDenied", "PermissionDenied"]);
    await takeUser();
    const takeEditor = await shareProject(other, projectId, ResourceRole.PROJECT_EDITOR);
    expect(await outcomes()).toEqual(["ok", "ok", "ok", "ok", "PermissionDenied"]);
    await takeEditor();
    await shareProject(other, projectId, ResourceRole.PROJECT_ADMIN);
    expect((await outcomes()).at(-1)).toBe("ok");
  });
});

async function outcome(call: Promise<unknown>): Promise<string> {
  try {
    await call;
    return "ok";
  } catch {
    return codeOf(call);
  }
}

/** Gives one user a role on the whole organization. */
const shareOrganizationRole = (userId: string, role: ResourceRole) =>
  share(plane, userId, { type: ResourceType.ORGANIZATION, id: plane.organizationId, role });

describe("UpdateProject", () => {
  test("changes what is given, clears by an empty path, and replaces messages whole", async () => {
    const { id: projectId } = await createProject(member.client, {
      ...{ devcontainerFilePath: "a.json", automationsFilePath: "b.yaml", technicalDescription: "first" },
      prebuildConfiguration: { enabled: true, environmentClassIds: [classId] },
    });
    const { projects } = member.client;
    const renamed = (await projects.updateProject({ projectId, name: "Other", devcontainerFilePath: "" })).project;
    expect(renamed).toMatchObject({
      devcontainerFilePath: "",
      automationsFilePath: "b.yaml",
      technicalDescription: "",
    });
    expect(renamed?.metadata?.name).toBe("Other");
    const initializer = { specs: [git("https://git.example.org/team/another")] };
    await projects.updateProject({ projectId, initializer, prebuildConfiguration: {}, technicalDescription: "second" });
    const recommendedEditors = { editors: { vscode: {}, intellij: { versions: ["2026.1"] } } };
    await projects.updateProject({ projectId, recommendedEditors });
    const found = await read(member.client, projectId);
    expect(found).toMatchObject({ initializer, recommendedEditors, technicalDescription: "" });
    expect(found?.prebuildConfiguration).toEqual(create(ProjectPrebuildConfigurationSchema));
    expect((await traces(plane, projectId)).actions).toEqual([
      "Project created",
      "changed name, devcontainer file path",
      "changed initializer, technical description, prebuild configuration",
      "changed recommended editors",
    ]);
    const byRepository = { filter: { specRemoteUris: ["https://git.example.org/team/another"] } };
    expect((await projects.listProjects(byRepository)).projects.map(({ id }) => id)).toContain(projectId);
    expect((await projects.listProjects({ filter: { search: "ANOTHER" } })).projects.map(({ id }) => id)).toContain(
      projectId,
    );
  });

  test("an update without a change writes nothing", async () => {
    const values = { devcontainerFilePath: "a.json", prebuildConfiguration: { timeout: { seconds: 600n } } };
    const { id: projectId, metadata } = await createProject(member.client, { ...values, technicalDescription: "same" });
    const before = await traces(plane, projectId);
    plane.advance(1000);
    const same = { ...values, technicalDescription: "same", name: "App", initializer: { specs: [git(REPOSITORY)] } };
    for (const request of [{}, same]) {
      const { project } = await member.client.projects.updateProject({ projectId, ...request });
      expect(project?.metadata).toEqual(metadata);
    }
    expect(await traces(plane, projectId)).toEqual(before);
  });

  test.each([
    ["an unknown editor", { recommendedEditors: { editors: { ed: {} } } }, "recommended_editors.editors"],
    [
      "an unknown version",
      { recommendedEditors: { editors: { goland: { versions: ["1.0"] } } } },
      "recommended_editors.editors",
    ],
    ["a bad initializer", { initializer: { specs: [git("-x")] } }, "initializer.specs[0].git.remote_uri"],
    ["an empty initializer", { initializer: {} }, "initializer.specs"],
    ["a blank name", { name: "\t" }, "name"],
  ])("%s is INVALID_ARGUMENT and changes nothing", async (_, values, field) => {
    const created = await createProject(member.client);
    const error = await refusal(
      member.client.projects.updateProject({ projectId: created.id, devcontainerFilePath: "x", ...values }),
    );
    expect([Code[error.code], violatedFields(error)]).toEqual(["InvalidArgument", [field]]);
    expect(await read(member.client, created.id)).toEqual(created);
  });

  test("an editor may send back a prebuild configuration that runs as somebody else", async () => {
    const executor = { id: member.id, principal: Principal.USER };
    const { id: projectId } = await createProject(member.client, { prebuildConfiguration: { executor } });
    await shareProject(other, projectId, ResourceRole.PROJECT_EDITOR);
    const { projects } = other.client;
    await projects.updateProject({ projectId, name: "Renamed", prebuildConfiguration: { executor } });
    const changed = { executor, enabled: true };
    expect(await codeOf(projects.updateProject({ projectId, prebuildConfiguration: changed }))).toBe(
      "PermissionDenied",
    );
  });
});

describe("several at once", () => {
  test("PLT-32 one that fails holds up nothing else", async () => {
    const good = { name: "Good", initializer: { specs: [git(REPOSITORY)] } };
    const bad = { name: "Bad", initializer: { specs: [git("file:///etc")] } };
    const { createdProjects, failedProjects } = await member.client.projects.createProjects({ projects: [bad, good] });
    expect(createdProjects.map(({ metadata }) => metadata?.name)).toEqual(["Good"]);
    expect(failedProjects).toMatchObject([{ index: 0, name: "Bad" }]);
    expect(failedProjects[0]?.error).toMatch(/^invalid_argument: initializer\.specs\[0\]\.git\.remote_uri: /);
    const [created] = createdProjects;
    expect((await read(member.client, created?.id ?? ""))?.metadata?.name).toBe("Good");

    const foreign = await createProject(admin);
    const updates = [
      { projectId: foreign.id, name: "Taken" },
      { projectId: created?.id, name: "Better" },
    ];
    const updated = await member.client.projects.updateProjects({ projects: updates });
    expect(updated.updatedProjects.map(({ metadata }) => metadata?.name)).toEqual(["Better"]);
    expect(updated.failedProjects).toMatchObject([
      { index: 0, projectId: foreign.id, error: `not_found: project ${foreign.id} not found` },
    ]);

    const projectIds = [created?.id ?? "", foreign.id];
    const deleted = await member.client.projects.deleteProjects({ projectIds });
    expect(deleted.deletedProjectIds).toEqual([created?.id]);
    expect(deleted.failedProjects).toMatchObject([{ index: 1, projectId: foreign.id }]);
    expect((await read(admin, foreign.id))?.metadata?.name).toBe("App");
  });

  test("all may fail, and one that is no valid message fails the whole call", async () => {
    const bad = { name: "Bad", initializer: {} };
    const { createdProjects, failedProjects } = await member.client.projects.createProjects({ projects: [bad, bad] });
    expect([createdProjects, failedProjects.map(({ index }) => index)]).toEqual([[], [0, 1]]);
    const good = { name: "Good before it", initializer: { specs: [git(REPOSITORY)] } };
    const invalid = { name: "", initializer: { specs: [git(REPOSITORY)] } };
    expect(await codeOf(member.client.projects.createProjects({ projects: [good, invalid] }))).toBe("InvalidArgument");
    const { projects } = await member.client.projects.listProjects({ filter: { search: "good before it" } });
    expect(projects).toEqual([]);
  });
});

describe("DeleteProject", () => {
  /** Runs `work` while the job that ends deletions cannot get at a project. */
  const pending = (projectId: string, work: () => Promise<void>) =>
    plane.plane.app.db.begin(async (tx) => {
      await tx`select from projects where id = ${projectId} for key share`;
      await work();
    });

  test("while it is pending only admins see the project, and nobody changes it", async () => {
    const { id: projectId } = await createProject(member.client, { name: "Pending" });
    await shareProject(other, projectId, ResourceRole.PROJECT_EDITOR);
    const { projects } = member.client;
    await pending(projectId, async () => {
      await projects.deleteProject({ projectId });
      const told = await traces(plane, projectId);
      await projects.deleteProject({ projectId });
      expect(await traces(plane, projectId)).toEqual(told);
      expect((await read(member.client, projectId))?.desiredPhase).toBe(ProjectPhase.DELETED);
      expect(await codeOf(other.client.projects.getProject({ projectId }))).toBe("NotFound");
      for (const client of [member.client, admin]) {
        expect((await client.projects.listProjects({ filter: { search: "pending" } })).projects).toEqual([]);
      }
      const refused = [
        await refusal(projects.updateProject({ projectId, name: "Kept" })),
        await refusal(other.client.projects.updateProject({ projectId, name: "Kept" })),
        await refusal(offer(member.client, projectId, classId)),
      ];
      for (const error of refused) expect(actionableCode(error)).toBe("FailedPrecondition PROJECT_STATE_DELETING");
      expect(await codeOf(other.client.projects.deleteProject({ projectId }))).toBe("PermissionDenied");
    });
  });

  test("then it is gone with all that hangs on it, and those who could see it are told", async () => {
    const { id: projectId } = await createProject(member.client);
    await offer(member.client, projectId, classId);
    await shareProject(other, projectId, ResourceRole.PROJECT_USER);
    const secretId = await insertSecret(projectId);
    await member.client.projects.deleteProject({ projectId });
    await eventually(
      async () => (await codeOf(member.client.projects.getProject({ projectId }))) === "NotFound",
      "its end",
    );
    expect(await codeOf(member.client.projects.deleteProject({ projectId }))).toBe("NotFound");
    const { point } = plane.plane.app.db;
    expect(await point`select from role_assignments where resource_id = ${projectId}`).toHaveLength(0);
    expect(await point`select from project_environment_classes where project_id = ${projectId}`).toHaveLength(0);
    const [event] = await point<{ readers: string[] }[]>`
      select readers from events where resource_id = ${projectId} and operation = ${DELETE}`;
    expect(event?.readers.toSorted()).toEqual([member.id, other.id].toSorted());
    expect(await point`select from secrets where id = ${secretId}`).toHaveLength(0);
    expect(await traces(plane, secretId)).toEqual({
      ...{ events: [[ResourceType.SECRET, DELETE]], actions: ["Secret deleted with its owner"] },
    });
    const { events, actions } = await traces(plane, projectId);
    expect(events.filter(([type]) => type === PROJECT).slice(-2)).toEqual([
      [PROJECT, UPDATE],
      [PROJECT, DELETE],
    ]);
    expect(actions.slice(-2)).toEqual(["Project deletion requested", "Project deleted"]);
  });
});

/** A secret of a project; its id. */
async function insertSecret(projectId: string): Promise<string> {
  const id = uuidv7();
  const message = create(SecretSchema, {
    id,
    name: "API_KEY",
    scope: { scope: { case: "projectId", value: projectId } },
  });
  await plane.plane.app.db.write`
    insert into secrets (id, organization_id, scope, scope_id, name, session, message)
    values (${id}, ${plane.organizationId}, ${Scope.PROJECT}, ${projectId}, 'API_KEY', ${uuidv7()}, ${toBinary(SecretSchema, message)})`;
  return id;
}

test("watchers are told of the projects that they see, and of no others", async () => {
  const [hidden, shared] = [await createProject(member.client), await createProject(member.client)];
  await shareProject(other, shared.id, ResourceRole.PROJECT_USER);
  await using streams = new AsyncDisposableStack();
  const watch = async (client: BerthClient) => {
    const types = [PROJECT, ResourceType.PROJECT_ENVIRONMENT_CLASS];
    const stream = await watchEvents(client, { resourceTypeFilters: types.map((resourceType) => ({ resourceType })) });
    streams.defer(() => stream.stop());
    return stream;
  };
  const [theirs, mine] = [await watch(other.client), await watch(member.client)];
  for (const { id: projectId } of [hidden, shared]) {
    await member.client.projects.updateProject({ projectId, name: "Renamed" });
    await offer(member.client, projectId, classId);
  }
  // What has gone cannot be judged any more.
  await theirs.next(eventText(ResourceType.PROJECT_ENVIRONMENT_CLASS, UPDATE, shared.id));
  for (const { id: projectId } of [hidden, shared]) await member.client.projects.deleteProject({ projectId });
  await theirs.next(eventText(PROJECT, DELETE, shared.id));
  await mine.next(eventText(PROJECT, DELETE, shared.id));
  expect(mine.events).toContain(eventText(PROJECT, DELETE, hidden.id));
  expect(theirs.events).toContain(eventText(ResourceType.PROJECT_ENVIRONMENT_CLASS, UPDATE, shared.id));
  expect(theirs.events).toContain(eventText(PROJECT, UPDATE, shared.id));
  expect(theirs.events.filter((event) => event.includes(hidden.id))).toEqual([]);
  expect(mine.events).toContain(eventText(PROJECT, UPDATE, shared.id));
});

describe("ListProjects", () => {
  let mine: string[];
  let owner: TestUser;

  beforeAll(async () => {
    owner = await plane.addUser();
    mine = [];
    for (const name of ["Alpha 50%", "Beta", "Gamma"]) {
      const initializer = { specs: [git(`https://git.example.org/list/${name.slice(0, 4).toLowerCase()}.git`)] };
      mine.push((await createProject(owner.client, { name, initializer })).id);
    }
  });

  const ids = async (request: Parameters<BerthClient["projects"]["listProjects"]>[0] = {}) =>
    (await owner.client.projects.listProjects(request)).projects.map(({ id }) => id);

  test("PLT-20 a project is in the lists of those it is shared with, and of nobody else", async () => {
    const [id = ""] = mine;
    const listed = async () =>
      (await other.client.projects.listProjects({ filter: { projectIds: [id] } })).projects.length > 0;
    expect(await listed()).toBe(false);
    expect((await admin.projects.listProjects({ filter: { projectIds: [id] } })).projects).toHaveLength(1);
    const unshare = await shareWithMembers(id);
    expect(await listed()).toBe(true);
    await unshare();
    expect(await listed()).toBe(false);
  });

  test("pages of one are each project once, the newest first while all are as popular", async () => {
    const found: string[] = [];
    let token = "";
    do {
      const { projects, pagination } = await owner.client.projects.listProjects({ pagination: { pageSize: 1, token } });
      found.push(...projects.map(({ id }) => id));
      token = pagination?.nextToken ?? "";
    } while (token);
    expect(found).toEqual(mine.toReversed());
    expect(await ids({ sort: { field: "id", order: SortOrder.ASC } })).toEqual(mine);
    expect(await ids({ sort: { field: "id" } })).toEqual(mine.toReversed());
    const first = await owner.client.projects.listProjects({ pagination: { pageSize: 1 } });
    const stolen = { pagination: { pageSize: 1, token: first.pagination?.nextToken }, filter: { search: "a" } };
    expect(await codeOf(owner.client.projects.listProjects(stolen))).toBe("InvalidArgument");
    const error = await refusal(owner.client.projects.listProjects({ sort: { field: "name" } }));
    expect([Code[error.code], violatedFields(error)]).toEqual(["InvalidArgument", ["sort.field"]]);
  });

  test("filters narrow together", async () => {
    const [alpha = "", beta = "", gamma = ""] = mine;
    expect(await ids({ filter: { search: "50%" } })).toEqual([alpha]);
    expect(await ids({ filter: { search: "BETA" } })).toEqual([beta]);
    expect(await ids({ filter: { search: gamma.slice(-12).toUpperCase() } })).toEqual([gamma]);
    expect(await ids({ filter: { search: "gamm", projectIds: [alpha, gamma] } })).toEqual([gamma]);
    expect(await ids({ filter: { projectIds: [alpha.toUpperCase(), uuidv7()] } })).toEqual([alpha]);
    expect(await ids({ filter: { specRemoteUris: ["https://git.example.org/list/beta.git"] } })).toEqual([beta]);
    expect(await ids({ filter: { specRemoteUris: ["https://git.example.org/list/beta"] } })).toEqual([]);
    expect(await ids({ filter: { creatorIds: [owner.id] } })).toEqual(mine.toReversed());
    expect(await ids({ filter: { creatorIds: [uuidv7()] } })).toEqual([]);
    await offer(owner.client, alpha, classId);
    await offer(owner.client, beta, "local");
    expect(await ids({ filter: { runnerIds: [runner.id] } })).toEqual([alpha]);
    expect(await ids({ filter: { runnerKinds: [RunnerKind.LOCAL] } })).toEqual([beta, alpha]);
    expect(await ids({ filter: { runnerKinds: [RunnerKind.REMOTE] } })).toEqual([]);
  });

  test("counts what matches, on the first page", async () => {
    const request = { count: { include: true }, pagination: { pageSize: 2 } };
    const { count, pagination } = await owner.client.projects.listProjects(request);
    expect(count).toMatchObject({ value: 3, relation: CountResponseRelation.EQ });
    const next = { ...request, pagination: { pageSize: 2, token: pagination?.nextToken } };
    expect((await owner.client.projects.listProjects(next)).count).toBeUndefined();
  });
});

/** Gives everybody the role USER on a project; returns how to take it away. */
async function shareWithMembers(projectId: string): Promise<() => Promise<void>> {
  const { db } = plane.plane.app;
  await db.write`
    insert into role_assignments (id, organization_id, group_id, resource_type, resource_id, resource_role, created_at)
    select gen_random_uuid(), organization_id, id, ${PROJECT}, ${projectId}, ${ResourceRole.PROJECT_USER}, now() from groups
    where organization_id = ${plane.organizationId} and name = 'org-members'`;
  return async () => void (await db.write`delete from role_assignments where resource_id = ${projectId}`);
}

describe("CreateProjectFromEnvironment", () => {
  const CHECKOUT = { branch: "main", latestCommit: "a".repeat(40) };

  async function environment(client: BerthClient, spec: object, git?: object): Promise<string> {
    const { environment } = await client.environments.createEnvironment({
      spec: { ...spec, machine: { class: classId } },
    });
    if (!environment) throw new Error("an answer without an environment");
    const status = runningStatus(environment);
    await runner.report(environment.id, { ...status, content: { ...status.content, git } });
    return environment.id;
  }
  const make = async (client: BerthClient, environmentId: string) =>
    (await client.projects.createProjectFromEnvironment({ name: "Copy", environmentId })).project;

  test("copies repository, paths and class, and nothing else", async () => {
    const specs = [
      git(REPOSITORY, { cloneTarget: "v1", targetMode: Mode.REMOTE_TAG }),
      git("https://git.example.org/a/b"),
    ];
    const environmentId = await environment(member.client, {
      content: { initializer: { specs } },
      devcontainer: { devcontainerFilePath: ".devcontainer/x.json" },
      automationsFile: { automationsFilePath: "auto.yaml" },
    });
    const project = await make(member.client, environmentId);
    expect(project).toMatchObject({
      ...{ initializer: { specs }, devcontainerFilePath: ".devcontainer/x.json", automationsFilePath: "auto.yaml" },
      environmentClasses: [{ order: 0, environmentClass: { case: "environmentClassId", value: classId } }],
      environmentClass: { order: 0, environmentClass: { case: "environmentClassId", value: classId } },
    });
    expect(await read(member.client, project?.id ?? "")).toEqual(project);
  });

  test.each([
    ["a repository", "", CHECKOUT, Mode.REMOTE_HEAD, ""],
    ["a branch", "/tree/feature/x/src", { ...CHECKOUT, branch: "feature/x" }, Mode.REMOTE_BRANCH, "feature/x"],
    ["a tag", "/tree/v1.0", { ...CHECKOUT, branch: "" }, Mode.REMOTE_TAG, "v1.0"],
    ["a release", "/releases/tag/v1.0", { ...CHECKOUT, branch: "" }, Mode.REMOTE_TAG, "v1.0"],
    ["a commit", `/commit/${"a".repeat(8)}`, { ...CHECKOUT, branch: "" }, Mode.REMOTE_COMMIT, "a".repeat(40)],
  ])("a context URL of %s becomes what it resolved to", async (_, page, checkout, targetMode, cloneTarget) => {
    const initializer = { specs: [contextUrl(`https://github.com/team/app${page}`)] };
    const cloneUrl = "https://github.com/team/app.git";
    const environmentId = await environment(member.client, { content: { initializer } }, { ...checkout, cloneUrl });
    const specs = [git(cloneUrl, { targetMode, cloneTarget })];
    expect((await make(member.client, environmentId))?.initializer).toMatchObject({ specs });
  });

  test("a pull request from a fork becomes its branch, with the base as upstream", async () => {
    const initializer = { specs: [contextUrl("https://github.com/team/app/pull/7")] };
    const checkout = { ...CHECKOUT, branch: "fix", cloneUrl: "https://github.com/somebody/app.git" };
    const environmentId = await environment(member.client, { content: { initializer } }, checkout);
    const upstreamRemoteUri = "https://github.com/team/app.git";
    const specs = [git(checkout.cloneUrl, { targetMode: Mode.REMOTE_BRANCH, cloneTarget: "fix", upstreamRemoteUri })];
    expect((await make(member.client, environmentId))?.initializer).toMatchObject({ specs });
  });

  test("a context URL that has not been resolved is kept", async () => {
    const initializer = { specs: [contextUrl("https://github.com/team/app/tree/dev")] };
    const environmentId = await environment(member.client, { content: { initializer } });
    expect((await make(member.client, environmentId))?.initializer).toMatchObject(initializer);
  });

  test("needs an environment of one's own, and a repository in it", async () => {
    const environmentId = await environment(member.client, {});
    expect(await codeOf(make(member.client, environmentId))).toBe("FailedPrecondition");
    expect(await codeOf(make(other.client, environmentId))).toBe("NotFound");
    expect(await codeOf(make(admin, environmentId))).toBe("PermissionDenied");
    expect(await codeOf(make(member.client, uuidv7()))).toBe("NotFound");
  });
});

test("a project tells who uses it and is the more popular the more and the later it was used", async () => {
  const owner = await plane.addUser();
  const [quiet, loud] = [await createProject(owner.client), await createProject(owner.client)];
  const { db } = plane.plane.app;
  const use = (projectId: string, days: number, subjectId = uuidv7()) => db.write`
    with use as (insert into project_uses values (${projectId}, ${uuidv7()}, ${new Date(plane.plane.app.now().getTime() - days * 86_400_000)}))
    insert into project_users values (${projectId}, ${subjectId}, ${Principal.USER}, ${new Date(Date.now() - days * 1000)})`;
  const users = Array.from({ length: 12 }, () => uuidv7());
  for (const [days, user] of users.entries()) await use(loud.id, days, user);
  await use(loud.id, 31);
  const found = await read(owner.client, loud.id);
  expect(found?.usedBy?.totalSubjects).toBe(13);
  expect(found?.usedBy?.subjects.map(({ id }) => id)).toEqual(users.slice(0, 10));

  const order = async () =>
    (await owner.client.projects.listProjects({})).projects.map(({ id }) => (id === loud.id ? "loud" : "quiet"));
  await use(quiet.id, 0);
  plane.advance(61 * 60_000);
  await sweep(plane, "project popularity");
  expect(await order()).toEqual(["loud", "quiet"]);
  const [row] = await db.point<{ popularity: number }[]>`select popularity from projects where id = ${loud.id}`;
  const weights = users.map((_, days) => 0.5 ** ((days * 24 + 61 / 60) / (7 * 24)));
  expect(row?.popularity).toBeCloseTo(
    weights.reduce((sum, each) => sum + each),
    3,
  );
  const ascending = { sort: { field: "popularity", order: SortOrder.ASC } };
  expect((await owner.client.projects.listProjects(ascending)).projects.map(({ id }) => id)).toEqual([
    quiet.id,
    loud.id,
  ]);
  // A month later nothing counts any more.
  plane.advance(31 * 86_400_000);
  await sweep(plane, "project popularity", "old project uses");
  expect(await order()).toEqual(["loud", "quiet"]);
  const [later] = await db.point<{ popularity: number; uses: number }[]>`
    select popularity, (select count(*)::int from project_uses where project_id = ${loud.id}) as uses from projects where id = ${loud.id}`;
  expect(later).toEqual({ popularity: 0, uses: 0 });
});
