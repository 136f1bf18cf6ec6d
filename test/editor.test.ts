import { create } from "@bufbuild/protobuf";
import { Code } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { type Environment, EnvironmentSpec_EnvironmentPortSchema as Port } from "../gen/gitpod/v1/environment_pb.js";
import { EDITORS, editorByIdOrAlias, editorUrl } from "../src/domain/editors.ts";
import { type FakeRunner, runningStatus } from "./harness/fake-runner.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { changePolicies, connectRunner } from "./harness/tenants.ts";

const FOLDER = "/workspaces/a b&c/ünï";

let plane: TestPlane;
let member: TestUser;
let runner: FakeRunner;
let classId: string;
let environment: Environment;

beforeAll(async () => {
  plane = await startTestPlane({
    BERTH_GATEWAYS: JSON.stringify([
      { name: "west", url: "https://west.example.org", region: "us-west" },
      { name: "east", url: "https://east.example.org/" },
    ]),
  });
  member = await plane.addUser();
  ({ runner, classId } = await connectRunner(plane));
  environment = await newEnvironment();
  await reportReachable(environment);
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await runner?.[Symbol.asyncDispose]();
  await plane[Symbol.asyncDispose]();
});

async function newEnvironment(ports: { port: number; name: string }[] = []): Promise<Environment> {
  const created = await member.client.environments.createEnvironment({
    spec: { machine: { class: classId }, ports: ports.map((each) => create(Port, each)) },
  });
  if (!created.environment) throw new Error("no environment");
  return created.environment;
}

/** Reports an environment as running, with a door for SSH and one for each port. */
async function reportReachable(which: Environment, ssh = "ssh://dev@ssh.example.org:2222"): Promise<void> {
  const status = runningStatus(which);
  await runner.report(which.id, {
    ...status,
    devcontainer: { ...status.devcontainer, remoteWorkspaceFolder: FOLDER },
    environmentUrls: {
      ...status.environmentUrls,
      ssh: { url: ssh },
      ports: (which.spec?.ports ?? []).map(({ port }) => ({ port, url: `http://runner.example.org/ports/${port}/` })),
    },
  });
}

const idOf = (alias: string) => editorByIdOrAlias(alias)?.id ?? "";

const resolve = (alias: string, more: { version?: string; environmentId?: string; organizationId?: string } = {}) =>
  member.client.editors.resolveEditorURL({
    editorId: idOf(alias),
    ...{ environmentId: environment.id, organizationId: plane.organizationId, ...more },
  });

/** Runs with changed policies, and gives the organization its old ones back. */
async function withPolicies(changes: Parameters<typeof changePolicies>[1], work: () => Promise<void>): Promise<void> {
  await changePolicies(plane, changes);
  try {
    await work();
  } finally {
    await changePolicies(plane, { allowedEditorIds: [], editorVersionRestrictions: {} });
  }
}

const allowing = (...allowedVersions: string[]) =>
  ({ $typeName: "gitpod.v1.EditorVersionPolicy", allowedVersions }) as const;

describe("the catalogue", () => {
  test("has editors with everything that clients show, each with an id and an alias of its own", () => {
    const aliases = EDITORS.map(({ alias }) => alias);
    expect(aliases).toEqual(
      expect.arrayContaining(["vscode", "vscode-browser", "cursor", "windsurf", "zed", "intellij", "goland", "ssh"]),
    );
    expect(new Set([...aliases, ...EDITORS.map(({ id }) => id)]).size).toBe(2 * EDITORS.length);
    for (const editor of EDITORS) {
      expect(editor.id).toMatch(/^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
      expect(editor.iconUrl).toMatch(/^data:image\/svg\+xml,%3Csvg/);
      expect(editor.shortDescription && editor.installationInstructions && editor.name).not.toBe("");
      // Nobody could choose a version that the link does not carry.
      expect(editor.versions.length > 0).toBe(editor.urlTemplate.includes("{version}"));
      const target = { environment_id: "e", organization_id: "o", host: "h", port: "22", user: "u", version: "1" };
      expect(editorUrl(editor, { ...target, browser_url: "http://p", folder: "/w" })).not.toMatch(/[{}]/);
    }
  });

  test("is listed in its order, in pages", async () => {
    const { editors, pagination } = await member.client.editors.listEditors({});
    expect(editors.map(({ alias }) => alias)).toEqual(EDITORS.map(({ alias }) => alias));
    expect(pagination?.nextToken).toBe("");
    const paged: string[] = [];
    for (let token = "", first = true; first || token; first = false) {
      const page = await member.client.editors.listEditors({ pagination: { pageSize: 4, token } });
      paged.push(...page.editors.map(({ id }) => id));
      token = page.pagination?.nextToken ?? "";
    }
    expect(paged).toEqual(EDITORS.map(({ id }) => id));
  });

  test("a page token belongs to its filter", async () => {
    const { pagination } = await member.client.editors.listEditors({ pagination: { pageSize: 1 } });
    const other = member.client.editors.listEditors({
      filter: { allowedByPolicy: true },
      pagination: { token: pagination?.nextToken ?? "" },
    });
    expect(violatedFields(await refusal(other))).toEqual(["pagination.token"]);
  });

  test("an editor has the names of its id and its alias, in any case", async () => {
    for (const id of [idOf("goland"), idOf("goland").toUpperCase(), "goland", "GoLand"]) {
      const { editor } = await member.client.editors.getEditor({ id });
      expect(editor).toMatchObject({ alias: "goland", name: "GoLand" });
    }
    expect(await codeOf(member.client.editors.getEditor({ id: "emacs" }))).toBe(Code[Code.NotFound]);
    expect(await codeOf(member.client.editors.getEditor({ id: uuidv7() }))).toBe(Code[Code.NotFound]);
  });
});

describe("which editors policy allows", () => {
  const allowed = async () => {
    const { editors } = await member.client.editors.listEditors({ filter: { allowedByPolicy: true } });
    return editors.map(({ alias }) => alias);
  };

  test("all, unless some are named by id or alias; unknown names allow nothing", async () => {
    expect(await allowed()).toHaveLength(EDITORS.length);
    await withPolicies({ allowedEditorIds: ["zed", idOf("vscode"), "emacs"] }, async () => {
      expect(await allowed()).toEqual(["vscode", "zed"]);
      expect((await member.client.editors.listEditors({})).editors).toHaveLength(EDITORS.length);
    });
    await withPolicies({ allowedEditorIds: ["emacs"] }, async () => expect(await allowed()).toEqual([]));
  });

  test("one that is barred opens nothing, and the answer names the policy", async () => {
    await withPolicies({ allowedEditorIds: ["zed"] }, async () => {
      await resolve("zed");
      const error = await refusal(resolve("vscode"));
      expect(Code[error.code]).toBe(Code[Code.FailedPrecondition]);
      expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([{ errorCode: "allowed_editor_ids" }]);
    });
  });
});

describe("links", () => {
  test.each([
    ["vscode", "vscode://vscode-remote/ssh-remote+dev@ssh.example.org:2222/workspaces/a%20b%26c/%C3%BCn%C3%AF"],
    ["cursor", "cursor://vscode-remote/ssh-remote+dev@ssh.example.org:2222/workspaces/a%20b%26c/%C3%BCn%C3%AF"],
    ["zed", "zed://ssh/dev@ssh.example.org:2222/workspaces/a%20b%26c/%C3%BCn%C3%AF"],
    ["ssh", "ssh://dev@ssh.example.org:2222"],
  ])("%s opens the checkout at the environment's address", async (alias, url) => {
    expect(await resolve(alias)).toMatchObject({ url });
  });

  test("a browser opens the port that is shared for it", async () => {
    expect(await codeOf(resolve("vscode-browser"))).toBe(Code[Code.FailedPrecondition]);
    const other = await newEnvironment([
      { port: 3000, name: "web" },
      { port: 8000, name: "vscode-browser" },
    ]);
    await reportReachable(other);
    expect(await resolve("vscode-browser", { environmentId: other.id })).toMatchObject({
      url: "http://runner.example.org/ports/8000/?folder=/workspaces/a%20b%26c/%C3%BCn%C3%AF",
    });
  });

  test("the version is the wanted one, else the newest that policy allows", async () => {
    const [newest = "", second = "", third = ""] = (editorByIdOrAlias("goland")?.versions ?? []).map(
      (each) => each.version,
    );
    const versionOf = async (version = "") =>
      /ideHint=GO-([\d.]+)&/.exec((await resolve("goland", { version })).url)?.[1];
    expect([await versionOf(), await versionOf(second)]).toEqual([newest, second]);
    await withPolicies({ editorVersionRestrictions: { goland: allowing(third, second) } }, async () => {
      expect([await versionOf(), await versionOf(newest), await versionOf(third)]).toEqual([second, second, third]);
    });
    await withPolicies({ editorVersionRestrictions: { [idOf("goland")]: allowing() } }, async () => {
      expect(await versionOf(second)).toBe(newest);
    });
    await withPolicies({ editorVersionRestrictions: { goland: allowing("1.0"), pycharm: allowing("2") } }, async () => {
      const error = await refusal(resolve("goland"));
      expect(Code[error.code]).toBe(Code[Code.FailedPrecondition]);
      expect(error.findDetails(ActionableErrorDetailsSchema)).toMatchObject([
        { errorCode: "editor_version_restrictions" },
      ]);
    });
  });

  test.each(["goland", "vscode"])("a version that %s does not have is INVALID_ARGUMENT", async (alias) => {
    expect(violatedFields(await refusal(resolve(alias, { version: "1999.1" })))).toEqual(["version"]);
  });

  test("an environment that is not running, or has no address, opens in nothing", async () => {
    const creating = await newEnvironment();
    expect(await codeOf(resolve("vscode", { environmentId: creating.id }))).toBe(Code[Code.FailedPrecondition]);
    for (const address of ["", "ssh://", "https://ssh.example.org", "ssh://dev@ssh.example.org"]) {
      const other = await newEnvironment();
      await reportReachable(other, address);
      const error = await refusal(resolve("vscode", { environmentId: other.id }));
      expect(`${address} ${Code[error.code]}`).toBe(`${address} ${Code[Code.FailedPrecondition]}`);
      // The word by which clients tell a missing feature of the runner from a wrong state.
      expect(error.rawMessage).toContain("capability");
    }
  });

  test("are for those who may enter the environment, in their organization", async () => {
    const as = (client: TestUser["client"], organizationId = plane.organizationId) =>
      codeOf(client.editors.resolveEditorURL({ editorId: idOf("zed"), environmentId: environment.id, organizationId }));
    expect(await as((await plane.addUser()).client)).toBe(Code[Code.NotFound]);
    // Admins see every environment, and enter none.
    expect(await as(plane.admin)).toBe(Code[Code.PermissionDenied]);
    expect(await as(member.client, uuidv7())).toBe(Code[Code.NotFound]);
    expect(await codeOf(resolve("zed", { environmentId: uuidv7() }))).toBe(Code[Code.NotFound]);
    const unknown = { editorId: uuidv7(), environmentId: environment.id, organizationId: plane.organizationId };
    expect(await codeOf(member.client.editors.resolveEditorURL(unknown))).toBe(Code[Code.NotFound]);
  });
});

test("gateways are those of the operator, by name, in pages", async () => {
  const { gateways } = await member.client.gateways.listGateways({});
  expect(gateways).toMatchObject([
    { name: "east", url: "https://east.example.org", region: "" },
    { name: "west", url: "https://west.example.org", region: "us-west" },
  ]);
  const first = await member.client.gateways.listGateways({ pagination: { pageSize: 1 } });
  const token = first.pagination?.nextToken ?? "";
  const second = await member.client.gateways.listGateways({ pagination: { pageSize: 1, token } });
  expect([...first.gateways, ...second.gateways].map(({ name }) => name)).toEqual(["east", "west"]);
  expect(second.pagination?.nextToken).toBe("");
});
