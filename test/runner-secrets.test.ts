import { lstat, mkdir, readdir, readFile, readlink, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { create } from "@bufbuild/protobuf";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { IntrospectTokenResponse_Kind as Kind } from "../gen/berth/runner/v1/runner_control_pb.js";
import {
  EnvironmentStatus_ContentPhase as ContentPhase,
  type Environment,
  EnvironmentPhase,
  type EnvironmentSpec_Secret,
  EnvironmentSpec_SecretSchema,
} from "../gen/gitpod/v1/environment_pb.js";
import { git as runGit } from "../src/runner/git.ts";
import { environmentPaths } from "../src/runner/paths.ts";
import { hiddenTexts, redact } from "../src/runner/redact.ts";
import { gitHelpers } from "../src/runner/secrets/git-helper.ts";
import { withLogins } from "../src/runner/secrets/registry.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { eventually } from "./harness/wait.ts";
import { contentOf, FakeControlPlane, fromGit, TestRunner } from "./runner-harness.ts";

const { READY, FAILED, UNAVAILABLE } = ContentPhase;
/** User id of nobody. */
const ORDINARY = 65_534;
const isRoot = process.getuid?.() === 0;

let git: GitServer;
let plane: FakeControlPlane;
let runner: TestRunner;

beforeAll(async () => {
  git = await startGitServer();
  await git.createRepository("project", { files: { "README.md": "hello\n", "config/.env": "checked in\n" } });
  plane = await FakeControlPlane.start();
  runner = await TestRunner.create(plane, git.host);
  await runner.start();
});

afterAll(async () => {
  await runner[Symbol.asyncDispose]();
  await plane[Symbol.asyncDispose]();
  await git.close();
});

type Mount = EnvironmentSpec_Secret["mount"];
const variable = (name: string): Mount => ({ case: "environmentVariable", value: name });
const file = (value: string): Mount => ({ case: "filePath", value });
const host = (value: string): Mount => ({ case: "gitCredentialHost", value });

async function running(secrets: EnvironmentSpec_Secret[], id?: string): Promise<string> {
  const created = plane.create({ ...contentOf(fromGit(git.url("project"))), secrets }, id);
  await plane.untilPhase(created, EnvironmentPhase.RUNNING);
  return created;
}

const stateOf = ({ status }: Environment, name: string) =>
  status?.secrets.find(({ secretName }) => secretName === name);

/** Waits until every secret of the specification has been dealt with. */
const settled = (id: string, control = plane) =>
  control.until(
    id,
    ({ spec, status }) =>
      status?.phase === EnvironmentPhase.RUNNING &&
      JSON.stringify(spec?.secrets.map(({ id, session }) => [id, session])) ===
        JSON.stringify(status.secrets.map(({ id, session }) => [id, session])),
    "the secrets are settled",
  );

/** Files with values; where there is an SSH server, its sessions have one of their own. */
const secretFiles = async (id: string, by = runner) =>
  (await readdir(by.folder(id, "secrets"))).filter((name) => !["files", "session.sh"].includes(name)).sort();

/** The log of an environment up to now. */
async function logOf(id: string): Promise<string> {
  return await (await runner.logs(id, plane.grant(id, Kind.ENVIRONMENT_LOGS), "?follow=false")).text();
}

/** What `git credential fill` answers inside of an environment. */
async function credential(id: string, url: string): Promise<string> {
  const asked = url.replace(/^(\w+):\/\/([^/]+)\/(.*)$/, "protocol=$1\\nhost=$2\\npath=$3\\n");
  const command = `printf '${asked}' | GIT_TERMINAL_PROMPT=0 GIT_ASKPASS= git credential fill 2>/dev/null || echo none`;
  return await runner.exec(id, command);
}

describe("variables", () => {
  test("ENV-34 every process has them, the runner's own included; a new value is for new processes", async () => {
    const id = await running([
      plane.secret("API_KEY", variable("API_KEY"), "first value\nof two lines"),
      plane.secret("GITPOD_API_KEY", variable("GITPOD_API_KEY"), "mine"),
    ]);
    expect(await runner.exec(id, 'printf "%s|%s|$GITPOD_ENVIRONMENT_ID" "$API_KEY" "$GITPOD_API_KEY"')).toBe(
      `first value\nof two lines|mine|${id}`,
    );
    const path = runner.folder(id, "secrets", "env");
    const { mode, uid } = await stat(path);
    expect(mode & 0o777).toBe(0o600);
    expect(uid).toBe((await runner.record(id)).user?.uid);
    expect((await settled(id)).status?.devcontainer?.secretsInSync).toBe(true);

    await runner.exec(id, "(while [ ! -e stop ]; do sleep 0.05; done; printenv API_KEY > seen) > /dev/null 2>&1 &");
    plane.renewSecret(id, "API_KEY", "second value");
    const changed = await settled(id);
    expect(stateOf(changed, "API_KEY")?.phase).toBe(READY);
    expect(changed.status?.devcontainer?.secretsInSync).toBe(false);
    expect(await runner.exec(id, "printenv API_KEY; printenv GITPOD_API_KEY")).toBe("second value\nmine");
    await runner.exec(id, "touch stop; while [ ! -s seen ]; do sleep 0.05; done");
    expect(await runner.exec(id, "cat seen")).toBe("first value\nof two lines");

    plane.edit(id, (spec) => {
      spec.secrets = spec.secrets.filter(({ name }) => name !== "API_KEY");
    });
    await settled(id);
    expect(await runner.exec(id, "printenv API_KEY || echo gone; printenv GITPOD_API_KEY")).toBe("gone\nmine");

    plane.stopEnvironment(id);
    await plane.untilPhase(id, EnvironmentPhase.STOPPED);
    expect(await secretFiles(id)).toEqual([]);
    plane.startEnvironment(id);
    await plane.untilPhase(id, EnvironmentPhase.RUNNING);
    expect(await runner.exec(id, "printenv GITPOD_API_KEY")).toBe("mine");
    expect(plane.environment(id).status?.devcontainer?.secretsInSync).toBe(true);
  });

  test("names that cannot be variables, and those that the runner needs itself, have failed and hold up nothing", async () => {
    const id = await running([
      plane.secret("1ABC", variable("1ABC"), "x"),
      plane.secret("MARK", variable("BERTH_ENVIRONMENT_ID"), "x"),
      plane.secret("FINE", variable("FINE"), "x"),
    ]);
    const { status } = plane.environment(id);
    expect(status?.secrets.map(({ secretName, phase }) => [secretName, phase])).toEqual([
      ["1ABC", FAILED],
      ["MARK", FAILED],
      ["FINE", READY],
    ]);
    expect(status?.warningMessage).toContain("secret 1ABC: its name is not that of a variable");
    expect(await runner.exec(id, "echo $FINE $BERTH_ENVIRONMENT_ID")).toBe(`x ${id}`);
  });

  test("more than processes can be given does not keep them from starting", async () => {
    const value = "x".repeat(10_000);
    const secrets = Array.from({ length: 60 }, (_each, index) =>
      plane.secret(`BIG_${index}`, variable(`BIG_${index}`), value),
    );
    const id = await running(secrets);
    const { status } = plane.environment(id);
    expect(status?.secrets.filter(({ phase }) => phase === READY).length).toBeGreaterThan(40);
    expect(stateOf(plane.environment(id), "BIG_59")).toMatchObject({
      ...{ phase: FAILED, failureMessage: "there is no room for more variables" },
    });
    expect(await runner.exec(id, "echo alive")).toBe("alive");
  });
});

describe("files", () => {
  test("ENV-34 a file in home or checkout stands at its path, follows its value in place, and goes with its secret", async () => {
    const id = "01981a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5b";
    const [home, checkout] = [runner.folder(id, "home"), runner.folder(id, "workspace", "project")];
    await running(
      [
        plane.secret("HOME_FILE", file(join(home, ".config/tool/key")), "home 1"),
        plane.secret("NEW_FILE", file(join(checkout, "deep/.env")), "checkout 1"),
        plane.secret("OLD_FILE", file(join(checkout, "config/.env")), "instead 1"),
      ],
      id,
    );
    expect(await runner.exec(id, "cat ~/.config/tool/key deep/.env config/.env")).toBe("home 1checkout 1instead 1");
    expect(await runner.exec(id, "cat config/.env.berth-backup")).toBe("checked in");
    expect(stateOf(plane.environment(id), "OLD_FILE")?.warningMessage).toContain(".berth-backup now");
    const target = await readlink(join(home, ".config/tool/key"));
    const { mode, uid } = await stat(target);
    expect([mode & 0o777, uid]).toEqual([0o600, (await runner.record(id)).user?.uid]);
    expect(target.startsWith(`${runner.folder(id, "secrets")}/`)).toBe(true);

    plane.renewSecret(id, "HOME_FILE", "home 2");
    await settled(id);
    expect(await readFile(join(home, ".config/tool/key"), "utf8")).toBe("home 2");
    expect(await readlink(join(home, ".config/tool/key"))).toBe(target);

    // A new checkout has the file as well, and the old one leads nowhere but to the same value.
    plane.edit(id, (spec) => {
      if (spec.content) spec.content.session = "another";
    });
    await plane.until(
      id,
      ({ status }) => status?.content?.session === "another" && status.phase === EnvironmentPhase.RUNNING,
      "the checkout is another",
    );
    expect(await runner.exec(id, "cat deep/.env config/.env")).toBe("checkout 1instead 1");

    plane.edit(id, (spec) => {
      spec.secrets = spec.secrets.filter(({ name }) => name === "OLD_FILE");
    });
    await settled(id);
    expect(await runner.exec(id, "ls ~/.config/tool/key deep/.env 2>/dev/null || cat config/.env")).toBe("instead 1");
    expect((await secretFiles(id)).length).toBe(2);
  });

  test("a path outside of the environment is not written to: the file lies with the secrets, and a variable names it", async () => {
    const path = "/etc/berth-test/key file.pem";
    const id = await running([plane.secret("PEM_KEY", file(path), "pem")]);
    expect(stateOf(plane.environment(id), "PEM_KEY")).toMatchObject({
      ...{ phase: READY, warningMessage: "its path is not in the environment: see $BERTH_SECRET_FILE_PEM_KEY" },
    });
    expect(await runner.exec(id, 'echo "$BERTH_SECRET_FILE_PEM_KEY"; cat "$BERTH_SECRET_FILE_PEM_KEY"')).toBe(
      `${runner.folder(id, "secrets/files", path)}\npem`,
    );
    await expect(lstat(path)).rejects.toMatchObject({ code: "ENOENT" });
    plane.edit(id, (spec) => {
      spec.secrets = [];
    });
    await settled(id);
    expect(await runner.exec(id, 'echo "$BERTH_SECRET_FILE_PEM_KEY|"')).toBe("|");
    await expect(lstat(runner.folder(id, "secrets/files", path))).rejects.toMatchObject({ code: "ENOENT" });
  });

  test("links and folders that somebody inside has laid do not lead a value out, nor anything of others in", async () => {
    const id = await running([]);
    const outside = join(runner.dataDir, "..", "outside");
    await mkdir(outside);
    await writeFile(join(outside, "victim"), "victim", { mode: 0o600 });
    await runner.exec(id, `ln -s /usr ~/door; mkdir -p ~/folder/inner; ln -s ${outside}/victim ~/disguise`);
    await runner.exec(
      id,
      `cd ../../secrets; ln -s ${outside}/victim env; rm -f env; mkdir env; rm -rf files; ln -s ${outside} files`,
    );
    plane.edit(id, (spec) => {
      const at = (path: string) => runner.folder(id, "home", path);
      spec.secrets = [
        plane.secret("DOOR", file(at("door/key")), "door value"),
        plane.secret("FOLDER", file(at("folder")), "folder value"),
        plane.secret("DISGUISE", file(at("disguise")), "disguise value"),
        plane.secret("DOTS", file(`${at("x")}/../../../../outside/dots`), "dots value"),
        plane.secret("OTHER", file("/elsewhere"), "other value"),
        plane.secret("VARIABLE", variable("VARIABLE"), "variable value"),
      ];
    });
    const environment = await settled(id);
    const phases = Object.fromEntries(
      environment.status?.secrets.map(({ secretName, phase }) => [secretName, phase]) ?? [],
    );
    expect(phases).toEqual({
      DOOR: FAILED,
      FOLDER: FAILED,
      DISGUISE: READY,
      DOTS: FAILED,
      OTHER: FAILED,
      VARIABLE: FAILED,
    });
    expect(stateOf(environment, "DOOR")?.failureMessage).toBe("its path leads out of the environment");
    expect(stateOf(environment, "FOLDER")?.failureMessage).toBe("there is a folder at its path");
    expect(await readFile(join(outside, "victim"), "utf8")).toBe("victim");
    expect(await readdir(outside)).toEqual(isRoot ? ["victim"] : expect.arrayContaining(["victim"]));
    expect(await runner.exec(id, "cat ~/disguise; readlink ~/disguise.berth-backup")).toBe(
      `disguise value${outside}/victim`,
    );
  });
});

describe("git", () => {
  test("a credential is for its host over https alone, in no address, and the next call uses a new one", async () => {
    const id = await running([
      plane.secret("git.example.org", host("git.example.org"), "user:pa:ss"),
      plane.secret("bad.example.org", host("bad.example.org"), "no-password"),
    ]);
    expect(stateOf(plane.environment(id), "bad.example.org")?.phase).toBe(FAILED);
    const found = await credential(id, "https://git.example.org/a/b.git");
    expect(found.split("\n")).toEqual(expect.arrayContaining(["username=user", "password=pa:ss"]));
    for (const url of [
      ...["http://git.example.org/a", "https://git.example.org.evil.example/a", "https://git.example.org:8443/a"],
      ...["https://other.example.org/a", "https://sub.git.example.org/a"],
    ])
      expect(await credential(id, url)).toBe("none");
    expect(await runner.exec(id, "cat ~/.gitconfig")).not.toContain("pa:ss");
    plane.renewSecret(id, "git.example.org", "user:newer");
    await settled(id);
    expect(await credential(id, "https://git.example.org/a")).toContain("password=newer");
    plane.edit(id, (spec) => {
      spec.secrets = [];
    });
    await settled(id);
    expect(await credential(id, "https://git.example.org/a")).toBe("none");
    expect(await secretFiles(id)).toEqual(["env"]);
  });

  test("credentials that people hold for hosts come from the runner's own protocol, in the form of the product", async () => {
    const hub = create(EnvironmentSpec_SecretSchema, {
      ...{ id: "hub", session: "1", name: "hub.example.org", source: "runner", sourceRef: "hub.example.org" },
      mount: host("hub.example.org"),
    });
    plane.hostTokens.set("hub.example.org", "people-token");
    const gone = {
      ...hub,
      id: "gone",
      name: "gone.example.org",
      sourceRef: "gone.example.org",
      mount: host("gone.example.org"),
    };
    const id = await running([hub, gone]);
    expect(stateOf(plane.environment(id), "gone.example.org")).toMatchObject({
      ...{ phase: FAILED, failureMessage: "its value is not available any more" },
    });
    const found = await credential(id, "https://hub.example.org/a/b.git");
    expect(found.split("\n")).toEqual(expect.arrayContaining(["username=x-access-token", "password=people-token"]));
  });
});

test("ENV-34 what this runner does not do is said, and no value of it comes near the environment", async () => {
  const proxied = plane.secret("PROXIED", variable("PROXIED"), "proxied value", {
    credentialProxy: { targetHosts: ["a.example"], header: "X", format: 1 },
  });
  const jfrog = plane.secret("JFROG", variable("JFROG"), "", {
    sourceDetails: { value: { case: "oidcJfrog", value: { host: "j.example", providerName: "p" } } },
  });
  const registry = plane.secret(
    "REGISTRY",
    { case: "containerRegistryBasicAuthHost", value: "r.example" },
    "u:registry",
  );
  const api = plane.secret("API_ONLY", { case: "apiOnly", value: true }, "api value");
  const asked = plane.secretsAsked.length;
  const id = await running([proxied, jfrog, registry, api]);
  expect(plane.environment(id).status?.secrets.map(({ phase, failureMessage }) => [phase, failureMessage])).toEqual([
    [UNAVAILABLE, "this runner has no proxy that could use the value"],
    [FAILED, "this runner cannot get tokens from JFrog"],
    [UNAVAILABLE, "there is no container engine on this runner"],
    [READY, ""],
  ]);
  expect(plane.secretsAsked.slice(asked)).toEqual([]);
  expect(await runner.exec(id, 'echo "$PROXIED$JFROG$REGISTRY$API_ONLY|"')).toBe("|");
  expect(await secretFiles(id)).toEqual(["env"]);
});

test("the log of an environment holds no value, not even one that is a name, also after the runner was started again", async () => {
  // The runner prints the address of what it clones.
  const canary = "canary-repository";
  await git.createRepository(canary, { files: { "README.md": "hello\n" } });
  const secrets = [
    plane.secret("CANARY", variable("CANARY"), canary),
    plane.secret("OTHER", file("/x"), "other-value"),
  ];
  const id = plane.create({ ...contentOf(fromGit(git.url(canary))), secrets });
  await plane.untilPhase(id, EnvironmentPhase.RUNNING);
  const log = await logOf(id);
  expect(log).toContain("Cloning http://");
  expect(log).toContain("[redacted]");
  expect(log).toMatch(/\[section-create\] \{[^}]*"title":"secrets"/);
  await runner.running?.stop();
  await runner.start();
  plane.edit(id, (spec) => {
    if (spec.content) spec.content.session = "again";
  });
  const isAnother = ({ status }: Environment) =>
    status?.content?.session === "again" && status.phase === EnvironmentPhase.RUNNING;
  await plane.until(id, isAnother, "it is cloned again");
  const later = await logOf(id);
  expect(later.match(/Cloning http:/g)).toHaveLength(2);
  expect(later).not.toContain(canary);
});

test("values that cannot be had at the moment are waited for, at the start and later", async () => {
  plane.withholdSecrets = true;
  const id = plane.create({ ...contentOf(), secrets: [plane.secret("LATE", variable("LATE"), "late")] });
  await plane.until(id, ({ status }) => status?.secrets[0]?.phase === ContentPhase.CREATING, "the secret is awaited");
  await eventually(() => runner.lines.join("").includes("not now"), "the runner was refused");
  expect(plane.environment(id).status?.phase).toBe(EnvironmentPhase.STARTING);
  plane.withholdSecrets = false;
  await plane.untilPhase(id, EnvironmentPhase.RUNNING);
  expect(await runner.exec(id, "echo $LATE")).toBe("late");
  plane.withholdSecrets = true;
  plane.renewSecret(id, "LATE", "later");
  await plane.until(
    id,
    ({ status }) => status?.secrets[0]?.phase === ContentPhase.UPDATING,
    "the new value is awaited",
  );
  expect(plane.environment(id).status?.phase).toBe(EnvironmentPhase.UPDATING);
  expect(await runner.exec(id, "echo $LATE")).toBe("late");
  plane.withholdSecrets = false;
  await settled(id);
  expect(await runner.exec(id, "echo $LATE")).toBe("later");
});

test.each(isRoot ? ["root", "an ordinary user"] : ["an ordinary user"])(
  "a runner of %s that is killed takes up afterwards what has changed meanwhile",
  async (who) => {
    await using other = await FakeControlPlane.start();
    await using killed = await TestRunner.create(other);
    const uid = who === "root" ? undefined : ORDINARY;
    const process = await killed.spawn({}, isRoot ? uid : undefined);
    const secrets = [
      other.secret("STAYS", variable("STAYS"), "stays"),
      other.secret("CHANGES", file("/changes"), "before"),
      other.secret("GOES", file("/goes"), "goes"),
    ];
    const id = other.create({ ...contentOf(), secrets });
    await other.untilPhase(id, EnvironmentPhase.RUNNING);
    const show = 'cat "$BERTH_SECRET_FILE_CHANGES" "$BERTH_SECRET_FILE_GOES" 2>&1; echo "|$STAYS|$COMES"';
    expect(await killed.exec(id, show)).toBe("beforegoes|stays|");
    await process.kill();
    other.renewSecret(id, "CHANGES", "after");
    other.edit(id, (spec) => {
      spec.secrets = [
        ...spec.secrets.filter(({ name }) => name !== "GOES"),
        other.secret("COMES", variable("COMES"), "comes"),
      ];
    });
    await killed.spawn({}, isRoot ? uid : undefined);
    await settled(id, other);
    expect(await killed.exec(id, show)).toMatch(/^after.*No such file or directory\n\|stays\|comes$/);
    expect(await secretFiles(id, killed)).toHaveLength(2);
  },
);

test("a context URL is resolved once the control plane can tell whether there is a credential for its host", async () => {
  plane.withholdSecrets = true;
  const asked = plane.hostsAsked.length;
  const specs = [{ spec: { case: "contextUrl" as const, value: { url: git.webUrl("project") } } }];
  const id = plane.create({ content: { initializer: { specs } } });
  await eventually(() => plane.hostsAsked.length > asked + 1, "the runner has asked again");
  expect(plane.hostsAsked.slice(asked)).toEqual(expect.arrayContaining([git.host]));
  expect(plane.environment(id).status?.failureMessage).toEqual([]);
  plane.withholdSecrets = false;
  await plane.untilPhase(id, EnvironmentPhase.RUNNING);
  expect(await runner.exec(id, "cat README.md")).toBe("hello");
});

test("git of the runner signs in to the host of a credential over https, and to no other", async () => {
  const paths = environmentPaths("/data", "id");
  const delivered = [{ id: "entry", delivery: { kind: "git" as const, host: "git.example.org" } }];
  const context = {
    ...{ cwd: "/", home: "/", environmentId: "id", protocols: ["https"], pinned: [] },
    timeoutMs: 10_000,
  };
  const helperFor = async (url: string) => {
    const args = ["config", "--get-urlmatch", "credential.helper", url];
    return (await runGit({ ...context, helpers: gitHelpers(paths, delivered) }, args)).stdout.trim();
  };
  expect(await helperFor("https://git.example.org/a/b.git")).toContain("cat '/data/environments/id/secrets/entry'");
  expect(await helperFor("http://git.example.org/a")).toBe("");
  expect(await helperFor("https://example.org/a")).toBe("");
});

test("of a secret with several lines each is hidden, unless it is as short as any word", () => {
  const hidden = hiddenTexts(["-----BEGIN-----\nMIIB-line-of-a-key\ntrue\n", "1234", "abc", ""]);
  expect(redact("MIIB-line-of-a-key true 1234 abc", hidden)).toBe("[redacted] true [redacted] abc");
  expect(redact("url http://user:password@host/ berth", hidden)).toBe("url http://[redacted]@host/ berth");
});

test("logins to registries are written beside what is there, in the one spelling that engines know", () => {
  const present = JSON.stringify({
    credsStore: "x",
    auths: { "r.example": { auth: "old" }, "gone.example": { auth: "g" } },
  });
  const logins = new Map([
    ["r.example", "user:pass"],
    ["docker.io", "hub:pass"],
  ]);
  expect(JSON.parse(withLogins(present, logins, ["gone.example"]))).toEqual({
    credsStore: "x",
    auths: {
      "r.example": { auth: Buffer.from("user:pass").toString("base64") },
      "https://index.docker.io/v1/": { auth: Buffer.from("hub:pass").toString("base64") },
    },
  });
  expect(JSON.parse(withLogins("", new Map(), []))).toEqual({ auths: {} });
  expect(() => withLogins("[]", logins, [])).toThrow();
});
