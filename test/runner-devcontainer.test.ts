import { readFile, rm, writeFile } from "node:fs/promises";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { IntrospectTokenResponse_Kind as Kind } from "../gen/berth/runner/v1/runner_control_pb.js";
import {
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  type Environment,
  EnvironmentPhase,
  EnvironmentSpec_DevContainer_LifecycleStage as Stage,
} from "../gen/gitpod/v1/environment_pb.js";
import { lifecycleOf } from "../src/runner/devcontainer/lifecycle.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { eventually } from "./harness/wait.ts";
import { contentOf, FakeControlPlane, fromGit, TestRunner } from "./runner-harness.ts";

const { RUNNING, STOPPED, UPDATING } = EnvironmentPhase;

vi.setConfig({ testTimeout: 120_000 });

let git: GitServer;
let plane: FakeControlPlane;
let runner: TestRunner;
beforeAll(async () => {
  git = await startGitServer();
  plane = await FakeControlPlane.start();
  runner = await TestRunner.create(plane, git.host);
  await runner.start();
});
afterAll(async () => {
  await runner[Symbol.asyncDispose]();
  await plane[Symbol.asyncDispose]();
  await git.close();
});

type Spec = NonNullable<Parameters<FakeControlPlane["create"]>[0]>;
let count = 0;

/** A repository whose dev container file says this. */
async function repositoryWith(container: object | string) {
  const text = typeof container === "string" ? container : JSON.stringify(container);
  return await git.createRepository(`d${++count}`, { files: { ".devcontainer/devcontainer.json": text } });
}

async function created(container: object | string, spec: Spec = {}) {
  return plane.create({ ...contentOf(fromGit((await repositoryWith(container)).url)), ...spec } as Spec);
}

async function running(container: object | string, spec: Spec = {}) {
  const id = await created(container, spec);
  return { id, ...containerOf(await plane.untilPhase(id, RUNNING)) };
}

const containerOf = ({ status }: Environment) => {
  if (!status?.devcontainer) throw new Error("no dev container");
  return { container: status.devcontainer, status };
};
const logOf = async (id: string, by = runner) =>
  await (await by.logs(id, plane.grant(id, Kind.ENVIRONMENT_LOGS), "?follow=false")).text();
const home = (id: string, name: string) => runner.folder(id, "home", name);
const textOf = (path: string) => readFile(path, "utf8").catch(() => "");

async function rebuild(id: string, session: string): Promise<Environment> {
  plane.edit(id, (spec) => {
    if (spec.devcontainer) spec.devcontainer.session = session;
  });
  return await plane.until(
    id,
    ({ status }) => status?.devcontainer?.session === session && status.phase === RUNNING,
    "the rebuild",
  );
}

async function restart(id: string): Promise<Environment> {
  plane.stopEnvironment(id);
  await plane.untilPhase(id, STOPPED);
  plane.startEnvironment(id);
  return await plane.untilPhase(id, RUNNING);
}

const ALL = {
  postAttachCommand: "echo attach >>~/order",
  postStartCommand: "echo start >>~/order",
  postCreateCommand: "echo create >>~/order; pwd >~/place; id -un >~/who; echo from-$CONTAINER-$REMOTE",
  updateContentCommand: ["sh", "-c", 'echo update >>~/order; printf %s "$1" >~/argument', "sh", "it's $HOME"],
  onCreateCommand: "echo on >>~/order",
  // biome-ignore lint/suspicious/noTemplateCurlyInString: dev container files have such variables.
  initializeCommand: "echo initialize >>~/order; echo ${containerWorkspaceFolder} >~/folder",
  containerEnv: { CONTAINER: "c" },
  // biome-ignore lint/suspicious/noTemplateCurlyInString: dev container files have such variables.
  remoteEnv: { REMOTE: "r", LATER: "${localEnv:HOME}" },
};

test.concurrent("ENV-35: without an engine the commands run on the host, in order, as the environment's user", async () => {
  const { id, container } = await running(ALL);
  const checkout = plane.environment(id).status?.content?.contentLocationInMachine;
  expect(container).toMatchObject({
    ...{ phase: DevContainerPhase.RUNNING, failureMessage: "", containerId: "", containerName: "" },
    ...{ remoteWorkspaceFolder: checkout, devcontainerconfigInSync: true },
  });
  expect(container.warningMessage).toBe(
    "no container engine: image and features of the dev container are ignored and commands run on the host",
  );
  expect(plane.environment(id).status?.warningMessage.join()).toContain("commands run on the host");
  await eventually(async () => (await textOf(home(id, "order"))).endsWith("attach\n"), "postAttachCommand");
  expect(await textOf(home(id, "order"))).toBe("initialize\non\nupdate\ncreate\nstart\nattach\n");
  expect(await textOf(home(id, "place"))).toBe(`${checkout}\n`);
  expect(await textOf(home(id, "folder"))).toBe(`${checkout}\n`);
  expect(await textOf(home(id, "argument"))).toBe("it's $HOME");
  expect(await textOf(home(id, "who"))).toBe(`${container.remoteUser}\n`);
  const log = await logOf(id);
  expect(log).toContain("Running postCreateCommand\nfrom-c-r\n");
  const [from, to] = [log.indexOf('"title":"devcontainer"'), log.indexOf('"title":"system"')];
  expect(log.slice(from, to)).toContain("Running postStartCommand");
});

test.concurrent("commands that create run once per session, those that start with every start", async () => {
  const { id } = await running({ ...ALL, postAttachCommand: undefined });
  await restart(id);
  expect(await textOf(home(id, "order"))).toBe("initialize\non\nupdate\ncreate\nstart\nstart\n");
  await rm(home(id, "order"));
  await rebuild(id, "second");
  expect(await textOf(home(id, "order"))).toBe("initialize\non\nupdate\ncreate\nstart\n");
});

test.concurrent("a failing command ends the chain with a warning; the environment runs, and the next start goes on", async () => {
  const { id, container } = await running({
    onCreateCommand: "echo on >>~/order; echo reason; exit 7",
    postCreateCommand: "echo create >>~/order",
    postStartCommand: "echo start >>~/order",
  });
  expect(container).toMatchObject({ phase: DevContainerPhase.RUNNING, failureMessage: "" });
  expect(container.warningMessage).toContain("onCreateCommand failed with exit code 7");
  expect(await textOf(home(id, "order"))).toBe("on\n");
  const log = await logOf(id);
  expect(log).toContain(
    "reason\nonCreateCommand failed with exit code 7\npostCreateCommand, postStartCommand left out\n",
  );
  const again = containerOf(await restart(id));
  expect(again.container.warningMessage).toContain("onCreateCommand failed with exit code 7");
  expect(await textOf(home(id, "order"))).toBe("on\nstart\n");
});

test.concurrent("several commands of one property run side by side, and the first that fails is named", async () => {
  const { id, container } = await running({
    // Each waits for the other, so that one after the other would never end.
    postCreateCommand: {
      left: "touch ~/left; until [ -e ~/right ]; do sleep 0.05; done; echo l",
      right: ["sh", "-c", "touch ~/right; until [ -e ~/left ]; do sleep 0.05; done; echo r"],
      broken: "exit 3",
    },
  });
  expect(container.warningMessage).toContain("postCreateCommand (broken) failed with exit code 3");
  const log = await logOf(id);
  expect(log).toContain("[left] l\n");
  expect(log).toContain("[right] r\n");
});

test.concurrent("a prebuild runs the first three commands alone", async () => {
  const { id } = await running(ALL, { devcontainer: { lifecycleStage: Stage.PREBUILD } });
  expect(await textOf(home(id, "order"))).toBe("initialize\non\nupdate\n");
});

test.concurrent("a rebuild is an update that is seen, and uses the file of now", async () => {
  const { id } = await running({ postCreateCommand: "echo one >~/made" });
  const path = ".devcontainer/devcontainer.json";
  const held = "until [ -e ~/go ]; do sleep 0.05; done; echo two >~/made";
  await runner.exec(id, `cat >${path} <<'END'\n${JSON.stringify({ postCreateCommand: held })}\nEND`);
  const edited = await plane.until(
    id,
    ({ status }) => status?.devcontainer?.devcontainerconfigInSync === false,
    "the edit",
  );
  expect(edited.status?.phase).toBe(RUNNING);
  plane.edit(id, (spec) => {
    if (spec.devcontainer) spec.devcontainer.session = "again";
  });
  const updating = await plane.until(
    id,
    ({ status }) => status?.devcontainer?.session === "again" && status.phase === UPDATING,
    "the update",
  );
  expect(updating.status?.devcontainer?.phase).toBe(DevContainerPhase.CREATING);
  expect(updating.status?.environmentUrls?.ops).not.toBe("");
  await runner.exec(id, "touch ~/go");
  const { container } = containerOf(await plane.untilPhase(id, RUNNING));
  expect(container).toMatchObject({ session: "again", devcontainerconfigInSync: true });
  expect(await textOf(home(id, "made"))).toBe("two\n");
});

test.concurrent("what cannot be run makes the dev container fail, and the environment runs nevertheless", async () => {
  const cases: [string, string][] = [
    ['{ "postCreateCommand": 3 }', "postCreateCommand is neither a command line nor a list of arguments"],
    ['{ "postCreateCommand": { "a": { "b": "c" } } }', "postCreateCommand.a is neither"],
    ["nonsense", "is not a JSON object"],
  ];
  for (const [text, reason] of cases) {
    const { container, status } = await running(text);
    expect(container.phase).toBe(DevContainerPhase.FAILED);
    expect(container.failureMessage).toContain(reason);
    expect(status.failureMessage).toEqual([]);
    expect(status.warningMessage.join()).toContain(reason);
  }
});

test.concurrent("a named file that does not exist fails the dev container", async () => {
  const { container } = await running({}, { devcontainer: { devcontainerFilePath: "other/devcontainer.json" } });
  expect(container).toMatchObject({
    phase: DevContainerPhase.FAILED,
    failureMessage: "dev container file other/devcontainer.json not found",
  });
});

test.concurrent("nobody waits for postAttachCommand; what goes wrong in it is a warning", async () => {
  const { id } = await running({ postAttachCommand: "until [ -e ~/go ]; do sleep 0.05; done; exit 4" });
  await runner.exec(id, "touch ~/go");
  const late = await plane.until(
    id,
    ({ status }) => (status?.devcontainer?.warningMessage ?? "").includes("postAttachCommand failed with exit code 4"),
    "the warning",
  );
  expect(late.status?.phase).toBe(RUNNING);
});

test.concurrent("commands of the dev container are nobody's activity, and hold up no stop", async () => {
  const id = await created({ postCreateCommand: "echo ready; sleep 600" });
  await eventually(async () => (await logOf(id)).includes("ready\n"), "the command");
  plane.stopEnvironment(id);
  await plane.untilPhase(id, STOPPED);
  expect(plane.activity).not.toContain(id);
});

test.concurrent("values of secrets are not readable in what commands write", async () => {
  const value = `hidden${Math.random().toString(36).slice(2)}`;
  const mount = { case: "environmentVariable" as const, value: "PASSWORD" };
  const { id } = await running(
    { postCreateCommand: "echo it is $PASSWORD" },
    {
      secrets: [plane.secret("PASSWORD", mount, value)],
    },
  );
  const log = await logOf(id);
  expect(log).toContain("it is [redacted]\n");
  expect(log).not.toContain(value);
});

test.concurrent("output is read from nowhere but a file of the environment's user", async () => {
  const secret = `root${Math.random().toString(36).slice(2)}`;
  const { id } = await running({ postCreateCommand: "echo one" });
  const path = runner.folder(id, "secret-of-root");
  await writeFile(path, secret, { mode: 0o600 });
  const swap = `cd ${runner.folder(id, "logs", "devcontainer")} && for f in *; do rm -f $f; ln -s ${path} $f; done; sleep 1`;
  await runner.exec(
    id,
    `cat >.devcontainer/devcontainer.json <<'END'\n${JSON.stringify({ postCreateCommand: swap })}\nEND`,
  );
  await rebuild(id, "again");
  expect(await logOf(id)).not.toContain(secret);
});

test.concurrent("dotfiles are cloned and their first executable install script runs, once per session", async () => {
  const dotfiles = await git.createRepository(`dots${++count}`, {
    files: {
      "install.sh": "echo not executable",
      install: { content: "#!/bin/sh\necho installed >>~/installed; pwd >~/where\n", executable: true },
      setup: { content: "#!/bin/sh\necho setup >>~/installed\n", executable: true },
    },
  });
  const spec = { devcontainer: { dotfiles: { repository: dotfiles.url } } };
  const { id, container } = await running({ postCreateCommand: "cp ~/installed ~/before" }, spec);
  expect(container.warningMessage).not.toContain("dotfiles");
  expect(await textOf(home(id, "installed"))).toBe("installed\n");
  expect(await textOf(home(id, "before"))).toBe("installed\n");
  expect(await textOf(home(id, "where"))).toBe(`${home(id, "dotfiles")}\n`);
  await restart(id);
  expect(await textOf(home(id, "installed"))).toBe("installed\n");
  await runner.exec(id, "echo mine >~/dotfiles/mine");
  await rebuild(id, "second");
  expect(await textOf(home(id, "installed"))).toBe("installed\ninstalled\n");
  expect(await textOf(home(id, "dotfiles.before/mine"))).toBe("mine\n");
  const log = await logOf(id);
  expect(log.indexOf('"title":"dotfiles"')).toBeLessThan(log.indexOf('"title":"devcontainer"'));
});

test.concurrent("dotfiles without a script are linked, and replace nothing", async () => {
  const dotfiles = await git.createRepository(`dots${++count}`, {
    files: {
      ".vimrc": "set nu\n",
      ".config/tool/rc": "rc\n",
      ".gitconfig": "[user]\n\tname = Somebody\n",
      plain: "p\n",
    },
  });
  const { id } = await running({}, { devcontainer: { dotfiles: { repository: dotfiles.url } } });
  expect(await runner.exec(id, "readlink ~/.vimrc ~/.config; cat ~/.config/tool/rc; ls ~/plain 2>&1 | wc -l")).toBe(
    "dotfiles/.vimrc\ndotfiles/.config\nrc\n1",
  );
  expect(await runner.exec(id, "git config user.name; ls -A ~ | grep -c partial || true")).toBe("Ada Lovelace\n0");
});

test.concurrent("dotfiles that cannot be had are a warning, and the rest goes on", async () => {
  const bad = git.url("no-dotfiles");
  const { id, container } = await running(
    { postCreateCommand: "touch ~/made" },
    { devcontainer: { dotfiles: { repository: bad } } },
  );
  expect(container).toMatchObject({ phase: DevContainerPhase.RUNNING });
  expect(container.warningMessage).toContain("dotfiles failed with exit code 1");
  expect(await runner.exec(id, "ls ~/made")).toBe(home(id, "made"));
  const refused = await running({}, { devcontainer: { dotfiles: { repository: "ext::sh -c true" } } });
  expect(refused.container.warningMessage).toContain("the dotfiles were not installed");
});

test.concurrent("dotfiles come from where content may come from, submodules along, and from nowhere else", async () => {
  const name = `dots${++count}`;
  await git.createRepository(`${name}-part`, { files: { part: "p\n" } });
  const { url } = await git.createRepository(name, { submodules: { part: `${name}-part` } });
  git.answer(`/${name}-old.git`, ({ path, query }) => ({
    status: 301,
    headers: { location: `${path.replace("-old.git", ".git")}?${query}` },
  }));
  const dotfiles = (repository: string) => running({}, { devcontainer: { dotfiles: { repository } } });
  const { id } = await dotfiles(git.url(`${name}-old`));
  expect(await runner.exec(id, "git -C ~/dotfiles remote get-url origin; cat ~/dotfiles/part/part")).toBe(`${url}\np`);
  // Not where the guards do not let content go to, nor where a host sends git that may be reached.
  const port = new URL(url).port;
  for (const address of ["https://169.254.169.254/me/dots", `http://localhost:${port}/${name}.git`]) {
    const { container } = await dotfiles(address);
    expect(container.warningMessage).toMatch(
      /the dotfiles were not installed: (this host is not|http is only) allowed/,
    );
  }
  git.answer(`/${name}-away.git`, {
    status: 302,
    headers: { location: `http://localhost:${port}/${name}.git/info/refs?service=git-upload-pack` },
  });
  expect((await dotfiles(git.url(`${name}-away`))).container.warningMessage).toContain("dotfiles failed");
});

test.concurrent("new content ends the command at work in the old one, which then runs in the new", async () => {
  const id = await created({ postCreateCommand: "pwd >>~/order; [ -e ~/go ] || sleep 600" });
  const folder = async () => plane.environment(id).status?.content?.contentLocationInMachine;
  await eventually(async () => (await textOf(home(id, "order"))) === `${await folder()}\n`, "the command");
  await writeFile(home(id, "go"), "");
  plane.edit(id, (spec) => {
    if (spec.content) spec.content.session = "second";
  });
  const { status } = await plane.untilPhase(id, RUNNING);
  expect(status?.content?.session).toBe("second");
  expect(status?.devcontainer?.warningMessage).not.toContain("failed");
  expect(await textOf(home(id, "order"))).toBe(`${await folder()}\n${await folder()}\n`);
});

test("a runner that is killed joins a command that runs on, and repeats none that has ended", async () => {
  const own = await FakeControlPlane.start();
  const other = await TestRunner.create(own, git.host);
  try {
    const repository = await repositoryWith({
      onCreateCommand: "echo on >>~/order",
      postCreateCommand: "echo create >>~/order; until [ -e ~/go ]; do sleep 0.05; done; echo done >>~/order",
      postStartCommand: "echo start >>~/order",
    });
    const first = await other.spawn();
    const id = own.create(contentOf(fromGit(repository.url)));
    const order = other.folder(id, "home", "order");
    await eventually(async () => (await textOf(order)) === "on\ncreate\n", "the command");
    await first.kill();
    const second = await other.spawn();
    await eventually(() => own.registrations.length === 2, "the second runner");
    await second.kill();
    // It ends while no runner looks.
    await writeFile(other.folder(id, "home", "go"), "");
    await eventually(async () => (await textOf(order)).endsWith("done\n"), "its end");
    await other.spawn();
    const environment = await own.untilPhase(id, RUNNING);
    expect(await textOf(order)).toBe("on\ncreate\ndone\nstart\n");
    expect(environment.status?.devcontainer?.warningMessage).not.toContain("failed");
  } finally {
    await other[Symbol.asyncDispose]();
    await own[Symbol.asyncDispose]();
  }
});

test("a supervisor that dies takes a command with it, which is then run anew; one that has ended is not", async () => {
  const supervisor = `$(sed 's/.*"pid":\\([0-9]*\\).*/\\1/' ~/../run/supervisor.json)`;
  const { id, container } = await running({
    onCreateCommand: "echo on >>~/order",
    postCreateCommand: `echo create >>~/order; [ -e ~/again ] || { touch ~/again; kill -9 ${supervisor}; sleep 300; }`,
  });
  expect(await textOf(home(id, "order"))).toBe("on\ncreate\ncreate\n");
  expect(container.warningMessage).not.toContain("failed");
});

test.for(["skip", "fail"] as const)("the operator decides about commands on the host: %s", async (hostDevcontainer) => {
  const own = await FakeControlPlane.start();
  const other = await TestRunner.create(own, git.host);
  try {
    const repository = await repositoryWith({ postCreateCommand: "touch ~/made", containerEnv: { COLOR: "blue" } });
    await other.start({ hostDevcontainer });
    const id = own.create(contentOf(fromGit(repository.url)));
    const { container } = containerOf(await own.untilPhase(id, RUNNING));
    if (hostDevcontainer === "fail") {
      expect(container.phase).toBe(DevContainerPhase.FAILED);
      expect(container.failureMessage).toBe("dev containers need a container engine on this runner");
    } else {
      expect(container.phase).toBe(DevContainerPhase.RUNNING);
      expect(container.warningMessage).toContain("commands skipped by configuration: postCreateCommand");
      expect(await other.exec(id, "echo $COLOR")).toBe("blue");
    }
    expect(await other.exec(id, "ls ~")).toBe("");
  } finally {
    await other[Symbol.asyncDispose]();
    await own[Symbol.asyncDispose]();
  }
});

test("commands are read as the file says them, and no others", () => {
  const read = (content: object) => lifecycleOf(content as Record<string, unknown>, Stage.FULL, "/w/repo");
  expect(read({ postCreateCommand: "", onCreateCommand: [], postStartCommand: null })).toEqual({
    ...{ create: [], start: [], attach: [] },
  });
  // biome-ignore lint/suspicious/noTemplateCurlyInString: dev container files have such variables.
  expect(read({ postStartCommand: ["a b", "${localWorkspaceFolderBasename}"] }).start).toEqual([
    { name: "postStartCommand", parts: [{ label: "", text: "'a b' 'repo'" }] },
  ]);
  expect(() => read({ postCreateCommand: "x".repeat(40_000) })).toThrow("postCreateCommand is longer");
  expect(() => read({ postCreateCommand: "a\0b" })).toThrow("postCreateCommand contains NUL");
  const many = Object.fromEntries(Array.from({ length: 33 }, (_, index) => [`c${index}`, "true"]));
  expect(() => read({ postCreateCommand: many })).toThrow("postCreateCommand has more than 32 commands");
});
