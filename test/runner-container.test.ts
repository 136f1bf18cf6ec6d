import { randomUUID } from "node:crypto";
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { IntrospectTokenResponse_Kind as Kind } from "../gen/berth/runner/v1/runner_control_pb.js";
import { ServicePhase, TaskExecutionPhase } from "../gen/gitpod/v1/environment_automation_pb.js";
import {
  EnvironmentStatus_RunnerACK_StatusCode as AckCode,
  AdmissionLevel,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  type Environment,
  EnvironmentPhase,
  EnvironmentStatus_DevContainer_Presence as Presence,
} from "../gen/gitpod/v1/environment_pb.js";
import { ENDED } from "../src/domain/automation-execution.ts";
import { dockerIgnore } from "../src/runner/devcontainer/docker-ignore.ts";
import { containerPlan, remoteUser } from "../src/runner/devcontainer/plan.ts";
import { loginsOf } from "../src/runner/devcontainer/registry-logins.ts";
import { createEnvironmentLogs } from "./harness/automation-logs.ts";
import { executionsOf, newService, newTask, readExecution, readService, startTask } from "./harness/automations.ts";
import { engineMissing, startContainerEngine, type TestEngine } from "./harness/container-engine.ts";
import { operations, reaches } from "./harness/environments.ts";
import { startFeatureRegistry } from "./harness/feature-registry.ts";
import { freePort } from "./harness/free-port.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { startHost } from "./harness/host.ts";
import { liftQuotas, startTestPlane } from "./harness/plane.ts";
import { admitPort } from "./harness/ports.ts";
import { eventually } from "./harness/wait.ts";
import { contentOf, FakeControlPlane, fromGit, TestRunner } from "./runner-harness.ts";

// Dev containers that run in a container: a real runner and a real engine that nobody else uses.

const { RUNNING, STOPPED } = EnvironmentPhase;
const missing = engineMissing();

vi.setConfig({ testTimeout: 120_000, hookTimeout: 120_000 });

type Files = Record<string, string>;

const FILE = ".devcontainer/devcontainer.json";
const planOf = (content: object, preset = "preset:1") => containerPlan({ ...content }, FILE, "/work/app", preset);

test("what a dev container file may not ask for is told with the property it stands in", () => {
  const build = (more: object) => ({ build: { dockerfile: "Dockerfile", ...more } });
  const cases: [object, string][] = [
    [{ dockerComposeFile: "compose.yml", service: "app" }, "dockerComposeFile"],
    [build({ dockerfile: "../../Dockerfile" }), "build.dockerfile leads out of the checkout"],
    [build({ dockerfile: "/etc/passwd" }), "build.dockerfile leads out of the checkout"],
    [{ dockerFile: "../../x" }, "build.dockerfile leads out of the checkout"],
    [build({ dockerfile: "a\nb" }), "build.dockerfile has control characters"],
    [build({ context: "../.." }), "build.context leads out of the checkout"],
    [build({ context: "a/../../../b" }), "build.context leads out of the checkout"],
    [build({ context: "/" }), "build.context leads out of the checkout"],
    [build({ target: "--file=/etc/shadow" }), "build.target is not the name of a stage"],
    [build({ args: { "A=B --network": "host" } }), "build.args has a name that is not one of a variable"],
    [build({ args: { A: 3 } }), "build.args.A is not a text"],
    [{ image: "--privileged" }, "image is not an image reference"],
    [{ image: 7 }, "image is not a text"],
    [{ containerEnv: ["A"] }, "containerEnv is not an object"],
    [{ features: { "./local": {} } }, "features have to come from a container registry"],
    [{ features: { "/etc": {} } }, "features have to come from a container registry"],
    [{ features: { "http://10.0.0.1/x.tgz": {} } }, "features have to come from a container registry"],
    [{ features: { "a/b:1": { list: ["x"] } } }, "options of features are texts or true and false"],
  ];
  for (const [content, reason] of cases) expect(() => planOf(content)).toThrow(reason);
  expect(() => planOf({}, "")).toThrow("names neither an image nor a Dockerfile");
});

test("what a dev container file asks for, with its variables filled in and none of the runner's", () => {
  // biome-ignore-start lint/suspicious/noTemplateCurlyInString: dev container files have such variables.
  const content = {
    build: { dockerfile: "Dockerfile", context: "..", args: { A: "${localEnv:HOME}", B: "${localEnv:HOME:preset}" } },
    containerUser: "dev",
    containerEnv: { PLACE: "${containerWorkspaceFolder}/x" },
  };
  // biome-ignore-end lint/suspicious/noTemplateCurlyInString: dev container files have such variables.
  expect(planOf(content)).toMatchObject({
    source: { dockerfile: ".devcontainer/Dockerfile", context: ".", args: { A: "", B: "preset" }, target: "" },
    ...{ user: "dev", ignored: [], features: {} },
  });
  expect(planOf({}).source).toEqual({ kind: "image", image: "preset:1" });
  const names = ["dev", "root", "", "0", "1000:1000", "-x", "a b", "dev:dev"].map((name) => remoteUser([name], "own"));
  expect(names).toEqual(["dev", "own", "own", "own", "own", "own", "own", "dev"]);
});

test("what .dockerignore leaves out", () => {
  const isLeftOut = dockerIgnore("# no\n\nnode_modules\n/dist/\n**/*.log\n!keep.log\nsub/*/x\n");
  const paths = [
    "node_modules",
    "node_modules/a",
    "a/node_modules",
    "dist/a",
    "a/b.log",
    "keep.log",
    "sub/a/x/y",
    "sub/x",
  ];
  expect(paths.filter((path) => isLeftOut?.(path))).toEqual([
    "node_modules",
    "node_modules/a",
    "dist/a",
    "a/b.log",
    "sub/a/x/y",
  ]);
  expect(dockerIgnore("# nothing\n!a\n")).toBeUndefined();
});

test("of a configuration of an engine only the logins are taken over", () => {
  const config = {
    auths: { a: { auth: "eDp5" }, b: { auth: "not base64!" } },
    credsStore: "x",
    credHelpers: { c: "y" },
  };
  expect(loginsOf(JSON.stringify(config))).toBe('{"auths":{"a":{"auth":"eDp5"}}}');
  expect(["", "nonsense", "{}", '{"auths":3}'].map(loginsOf)).toEqual([undefined, undefined, undefined, undefined]);
});

describe.skipIf(missing)(`dev containers in containers${missing ? ` (${missing})` : ""}`, () => {
  let git: GitServer;
  let engine: TestEngine;
  let plane: FakeControlPlane;
  let runner: TestRunner;
  let count = 0;
  beforeAll(async () => {
    git = await startGitServer();
    engine = await startContainerEngine();
    plane = await FakeControlPlane.start();
    plane.classConfiguration = { cpu: "1", memory: "512", isolation: "container" };
    runner = await TestRunner.create(plane, git.host);
    await start();
  });
  const start = () => runner.start({ containerEngine: "docker", dockerHost: engine.dockerHost });
  afterAll(async () => {
    await runner?.[Symbol.asyncDispose]();
    await engine?.[Symbol.asyncDispose]();
    await plane?.[Symbol.asyncDispose]();
    await git?.close();
  });

  async function created(container: object, files: Files = {}, spec: object = {}): Promise<string> {
    const all = { ".devcontainer/devcontainer.json": JSON.stringify(container), ...files };
    const { url } = await git.createRepository(`c${++count}`, { files: all });
    return plane.create({ ...contentOf(fromGit(url)), ...spec });
  }

  async function running(container: object, files?: Files, spec?: object) {
    const id = await created(container, files, spec);
    return { id, ...containerOf(await plane.untilPhase(id, RUNNING)) };
  }

  const containerOf = ({ status }: Environment) => {
    if (!status?.devcontainer) throw new Error("no dev container");
    return { container: status.devcontainer, status };
  };
  const logOf = async (id: string) =>
    await (await runner.logs(id, plane.grant(id, Kind.ENVIRONMENT_LOGS), "?follow=false")).text();
  const nameOf = (id: string) => `berth-${id}`;
  const inspect = async (id: string, format: string) => await engine.docker("inspect", "--format", format, nameOf(id));

  test.concurrent("commands, files and terminals are those of the container, as the environment's user", async () => {
    const secrets = [
      plane.secret("WORD", { case: "environmentVariable", value: "SECRET_WORD" }, "a secret word"),
      plane.secret("FILE", { case: "filePath", value: "/etc/secret-file" }, "a secret text"),
    ];
    const file = {
      image: engine.image,
      remoteUser: "dev",
      containerEnv: { KIND: "contained" },
      // biome-ignore lint/suspicious/noTemplateCurlyInString: dev container files have such variables.
      remoteEnv: { MORE: "${containerEnv:KIND}-more", HOST: "${localEnv:PATH}" },
      initializeCommand: "[ -e /etc/hostname ] && echo host >~/initialized",
      onCreateCommand: "id -un >~/created; ls / >~/seen",
      postStartCommand: "echo start >>~/started",
      postAttachCommand: "echo $KIND $MORE $HOST. >~/attached",
    };
    const { id, container, status } = await running(file, {}, { secrets });
    expect(container).toMatchObject({
      ...{ phase: DevContainerPhase.RUNNING, failureMessage: "", warningMessage: "", remoteUser: "dev" },
      ...{ containerName: nameOf(id), remoteWorkspaceFolder: status.content?.contentLocationInMachine },
    });
    expect(container.containerId).toBe(await inspect(id, "{{.Id}}"));
    const { user } = await runner.record(id);
    expect(await runner.exec(id, "id -u; id -g; id -un; pwd")).toBe(
      `${user?.uid}\n${user?.uid}\ndev\n${container.remoteWorkspaceFolder}`,
    );
    expect(await runner.exec(id, "ls /bin/busybox; ls /usr 2>/dev/null || echo none")).toContain("none");
    expect(await runner.exec(id, "echo $KIND $MORE $HOST.")).toBe("contained contained-more .");
    expect(await runner.exec(id, "echo $SECRET_WORD; cat $BERTH_SECRET_FILE_FILE /etc/secret-file")).toBe(
      "a secret word\na secret texta secret text",
    );
    expect(status.secrets.map(({ warningMessage }) => warningMessage)).toEqual(["", ""]);
    expect(await runner.exec(id, "berth --help | head -n 1")).toContain("berth: ");
    const ops = runner.ops(id);
    await ops.writeFile({ path: "/tmp/inside", content: new TextEncoder().encode("written inside") });
    expect(await runner.exec(id, "cat /tmp/inside")).toBe("written inside");
    const { result } = await ops.readFile({ path: "/etc/passwd" });
    expect(result.case === "content" && new TextDecoder().decode(result.value.data)).toContain("dev:x:");
    const { terminalId } = await ops.createTerminal({});
    await ops.writeTerminal({ terminalId, data: new TextEncoder().encode("id -un; exit\n") });
    let seen = "";
    for await (const { data } of ops.readTerminal({ terminalId })) seen += new TextDecoder().decode(data);
    expect(seen).toContain("\r\ndev\r\n");
    expect((await ops.getGitStatus({})).status?.branch).toBe("main");
    const home = (name: string) => readFile(runner.folder(id, "home", name), "utf8");
    expect(await home("initialized")).toBe("host\n");
    expect(await home("created")).toBe("dev\n");
    expect(await home("seen")).not.toContain("usr");
    await eventually(async () => (await home("attached")) === "contained contained-more .\n", "postAttachCommand");
    expect(await logOf(id)).toContain("Running onCreateCommand");
  });

  test.concurrent("secrets are files of the container where they are asked for, follow their value, and touch nothing else", async () => {
    const at = (name: string, path: string, value: string) =>
      plane.secret(name, { case: "filePath", value: path }, value);
    const mark = `berth-secret-${randomUUID()}`;
    const deep = `/opt/${"deep/".repeat(30)}key`;
    const secrets = [
      at("KEY", "/opt/app/key.pem", "first"),
      at("DEEP", deep, "deep"),
      at("OVER", "/etc/settings", "over"),
      at("FOLDER", "/bin", "never"),
      at("LED", `/etc/led/${mark}`, "led"),
      at("RUNTIME", `/etc/runtime/${mark}`, "never"),
      at("DATA", `${runner.dataDir}/container-runtime/${mark}`, "never"),
    ];
    const lines = [
      "mkdir -p /etc",
      "echo image >/etc/settings",
      "ln -s /tmp /etc/led",
      `ln -s ${runner.dataDir}/container-runtime /etc/runtime`,
    ];
    const { id, container, status } = await running(
      { build: { dockerfile: "Dockerfile" }, postCreateCommand: "cat /opt/app/key.pem >~/created" },
      { ".devcontainer/Dockerfile": `FROM ${engine.image}\nRUN ${lines.join(" && ")}\n` },
      { secrets },
    );
    const refused = container.warningMessage.split("; ").map((warning) => warning.split(":")[0]);
    expect(refused).toEqual([
      "a secret could not be put at /bin, see $BERTH_SECRET_FILE_FOLDER",
      `a secret could not be put at /etc/runtime/${mark}, see $BERTH_SECRET_FILE_RUNTIME`,
    ]);
    const warnings = Object.fromEntries(status.secrets.map((each) => [each.secretName, each.warningMessage]));
    const none = { KEY: "", DEEP: "", OVER: "", FOLDER: "", LED: "", RUNTIME: "" };
    expect(warnings).toEqual({ ...none, DATA: "its path is not in the environment: see $BERTH_SECRET_FILE_DATA" });
    const all = `cat ~/created /opt/app/key.pem ${deep} /etc/settings /tmp/${mark}`;
    expect(await runner.exec(id, all)).toBe("firstfirstdeepoverled");
    const onHost = [`/tmp/${mark}`, `${runner.dataDir}/container-runtime/${mark}`, "/opt/app/key.pem"];
    for (const path of onHost) expect(existsSync(path)).toBe(false);
    expect(await runner.exec(id, "ls -l /opt/app/key.pem | cut -c1; cat /opt/app/key.pem")).toBe("l\nfirst");

    plane.renewSecret(id, "KEY", "second");
    await eventually(async () => (await runner.exec(id, "cat /opt/app/key.pem")) === "second", "the new value");
    plane.edit(id, (spec) => {
      spec.secrets = [...spec.secrets.filter(({ name }) => name !== "OVER"), at("LATE", "/opt/late", "late")];
    });
    const late = await plane.until(
      id,
      (each) => each.status?.phase === RUNNING && each.status.secrets.some(({ secretName }) => secretName === "LATE"),
      "the late secret",
    );
    expect(late.status?.secrets.find(({ secretName }) => secretName === "LATE")?.warningMessage).toBe(
      "its path is in the dev container from its next start on: see $BERTH_SECRET_FILE_LATE until then",
    );
    const isThere = (path: string) => runner.exec(id, `cat ${path} 2>/dev/null || echo nothing`);
    expect([await isThere("/opt/late"), await isThere("/etc/settings")]).toEqual(["nothing", "nothing"]);
    plane.stopEnvironment(id);
    await plane.untilPhase(id, STOPPED);
    plane.startEnvironment(id);
    const again = await plane.untilPhase(id, RUNNING);
    expect(again.status?.secrets.find(({ secretName }) => secretName === "LATE")?.warningMessage).toBe("");
    expect([await isThere("/opt/late"), await isThere("/opt/app/key.pem")]).toEqual(["late", "second"]);
    await rebuild(id, "second");
    expect([await isThere("/opt/late"), await isThere("/etc/settings")]).toEqual(["late", "image"]);
  });

  const rebuild = async (id: string, session: string) => {
    plane.edit(id, (spec) => {
      if (spec.devcontainer) spec.devcontainer.session = session;
    });
    const isThere = ({ status }: Environment) => status?.devcontainer?.session === session && status.phase === RUNNING;
    return containerOf(await plane.until(id, isThere, "the rebuild"));
  };

  test.concurrent("a stop keeps the container, a rebuild replaces it, and a deletion leaves nothing", async () => {
    const { id, container } = await running({
      image: engine.image,
      postCreateCommand: "echo create >>~/order; echo kept >/tmp/own",
      postStartCommand: "echo start >>~/order",
    });
    await runner.exec(id, "echo kept >here");
    plane.stopEnvironment(id);
    await plane.untilPhase(id, STOPPED);
    expect(await inspect(id, "{{.State.Running}}")).toBe("false");
    plane.startEnvironment(id);
    const again = containerOf(await plane.untilPhase(id, RUNNING));
    expect(again.container.containerId).toBe(container.containerId);
    expect(await runner.exec(id, "cat /tmp/own ~/order")).toBe("kept\ncreate\nstart\nstart");
    const rebuilt = await rebuild(id, "second");
    expect(rebuilt.container.containerId).not.toBe(container.containerId);
    expect(rebuilt.container.containerId).toBe(await inspect(id, "{{.Id}}"));
    expect(await runner.exec(id, "cat here ~/order")).toBe("kept\ncreate\nstart\nstart\ncreate\nstart");
    const label = `label=berth.environment=${id}`;
    expect((await engine.docker("images", "--quiet", "--filter", label)).split("\n")).toHaveLength(1);
    plane.deleteEnvironment(id);
    await eventually(() => plane.isGone(id), "the deletion");
    expect(await engine.docker("ps", "--all", "--quiet", "--filter", label)).toBe("");
    expect(await engine.docker("images", "--all", "--quiet", "--filter", label)).toBe("");
  });

  test.concurrent("a Dockerfile is built from the checkout, without what .dockerignore names", async () => {
    const { id, container } = await running(
      { build: { dockerfile: "Dockerfile", context: "..", args: { WORD: "said" }, target: "last" } },
      {
        ".devcontainer/Dockerfile": `FROM ${engine.image} AS last\nARG WORD\nENV FROM_IMAGE=yes PATH=/opt:/bin\nCOPY . /opt/copied\nRUN echo $WORD >/opt/word\n`,
        ".dockerignore": "left*\n!left-in\n",
        "left-out": "",
        "left-in": "",
      },
    );
    expect(container).toMatchObject({ phase: DevContainerPhase.RUNNING, warningMessage: "" });
    expect(await runner.exec(id, "cat /opt/word; ls /opt/copied; echo $FROM_IMAGE $PATH")).toMatch(
      /^said\nleft-in\nyes \/opt:\/bin:\S+\/container\/bin$/,
    );
    expect(await logOf(id)).toContain("RUN echo $WORD");
  });

  test.concurrent("features are installed with their options, and get no more than any image", async () => {
    await using registry = await startFeatureRegistry(
      {
        ...{ id: "hello", version: "1.0.0", name: "Hello", options: { word: { type: "string", default: "hey" } } },
        ...{ containerEnv: { FROM_FEATURE: "yes" }, privileged: true, mounts: ["source=/,target=/host,type=bind"] },
      } as { id: string },
      '#!/bin/sh\necho "the word is $WORD" >/word\n',
    );
    const lines = ["mkdir -p /etc", "echo 'root:x:0:0::/:/bin/sh' >/etc/passwd", "echo 'root:x:0:' >/etc/group"];
    const { id, container } = await running(
      { build: { dockerfile: "Dockerfile" }, features: { [registry.feature]: { word: "it's here" } } },
      { ".devcontainer/Dockerfile": `FROM ${engine.image}\nRUN ${lines.join(" && ")}\n` },
    );
    expect(container).toMatchObject({ phase: DevContainerPhase.RUNNING, failureMessage: "", warningMessage: "" });
    expect(await runner.exec(id, "cat /word; echo $FROM_FEATURE; ls /host 2>/dev/null || id -un")).toBe(
      `the word is it's here\nyes\n${(await runner.record(id)).user?.name}`,
    );
    expect(await inspect(id, "{{.HostConfig.Privileged}} {{len .Mounts}}")).toBe("false 8");
    expect(await logOf(id)).toContain("devcontainer-features");
    plane.deleteEnvironment(id);
    await eventually(() => plane.isGone(id), "the deletion");
    const label = `label=berth.environment=${id}`;
    expect(await engine.docker("images", "--all", "--quiet", "--filter", label)).toBe("");
  });

  test.concurrent("what would open the host has no effect, and is named", async () => {
    const { id, container } = await running({
      ...{ image: engine.image, remoteUser: "root", privileged: true, capAdd: ["SYS_ADMIN", "SYS_PTRACE"] },
      runArgs: ["--privileged", "--volume=/:/host", "--user=0", "--pid=host"],
      mounts: ["source=/,target=/host,type=bind"],
      securityOpt: ["seccomp=unconfined"],
      ...{ workspaceMount: "source=/,target=/work,type=bind", workspaceFolder: "/work" },
    });
    expect(container.phase).toBe(DevContainerPhase.RUNNING);
    expect(container.warningMessage).toBe(
      "ignored in the dev container file: runArgs, mounts, privileged, capAdd, securityOpt, workspaceMount, workspaceFolder",
    );
    const { user } = await runner.record(id);
    expect(
      await runner.exec(id, "id -u; ls /host /work 2>/dev/null | head -n 1; grep -E 'Cap|NoNew' /proc/self/status"),
    ).toBe(
      [
        String(user?.uid),
        ...["Inh", "Prm", "Eff", "Bnd", "Amb"].map((name) => `Cap${name}:\t0000000000000000`),
        "NoNewPrivs:\t1",
      ].join("\n"),
    );
    const mounts = await inspect(id, "{{range .Mounts}}{{.Source}}:{{.RW}} {{end}}");
    const own = ["workspace", "home", "secrets", "logs", "run", "run", "container"].map((name) =>
      runner.folder(id, name),
    );
    expect(mounts.trim().split(" ").sort()).toEqual(
      [
        ...own.map((path) => `${path}:${!path.endsWith("/container")}`),
        `${runner.dataDir}/container-runtime:false`,
      ].sort(),
    );
    const limits = "{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}}";
    expect(await inspect(id, limits)).toBe(`${512 * 1024 * 1024} 1000000000 8192`);
    expect(await inspect(id, "{{.HostConfig.Privileged}} {{.HostConfig.PidMode}}.{{.HostConfig.UsernsMode}}")).toBe(
      "false .host",
    );
    expect(await runner.exec(id, "touch $(dirname $0 2>/dev/null || echo /)/x 2>/dev/null || echo denied")).toBe(
      "denied",
    );
  });

  test.concurrent("what cannot be had is a failure that says why, and commands run on the host", async () => {
    const build = (more: object) => ({ build: { dockerfile: "Dockerfile", ...more } });
    const link = "cat Dockerfile";
    const cases: [object, string, Files?][] = [
      [{ dockerComposeFile: "compose.yml", service: "app" }, "dockerComposeFile"],
      [{ image: engine.image, features: { "berth.test/none/x:1": {} } }, "features could not be installed"],
      [build({ dockerfile: "../../Dockerfile" }), "build.dockerfile leads out of the checkout"],
      [{ image: "berth.test/missing:1" }, "image berth.test/missing:1 could not be pulled"],
      [build({}), "non-zero code: 7", { ".devcontainer/Dockerfile": `FROM ${engine.image}\nRUN ${link}; exit 7\n` }],
      [{ image: engine.bareImage }, "could not be started"],
    ];
    await Promise.all(
      cases.map(async ([file, reason, files]) => {
        const { id, container, status } = await running(file, files);
        expect(container.failureMessage).toContain(reason);
        expect(container).toMatchObject({ phase: DevContainerPhase.FAILED, containerId: "", containerName: "" });
        expect(status.warningMessage.join()).toContain(reason);
        expect(await runner.exec(id, "test -e /etc/hostname && echo host")).toBe("host");
        expect(await engine.docker("ps", "--all", "--quiet", "--filter", `label=berth.environment=${id}`)).toBe("");
      }),
    );
  });

  test.concurrent("links of a repository lead no further than its user, and files of the host get into no image", async () => {
    const { id, container } = await running(build("context"), {
      "context/Dockerfile": `FROM ${engine.image}\nCOPY . /seen\n`,
    });
    expect(container.failureMessage).toBe("");
    const place = ".devcontainer";
    // What a repository can hold as well as somebody in the environment can make it.
    for (const [target, reason] of [
      ["/etc", "have to lie in the checkout"],
      ["../../../..", "have to lie in the checkout"],
    ]) {
      await runner.exec(id, `rm -rf context ${place}/context; ln -s ${target} context`);
      const { container: failed } = await rebuild(id, `link-${target}`);
      expect(failed.phase).toBe(DevContainerPhase.FAILED);
      expect(failed.failureMessage).toContain(reason);
    }
    const secret = runner.folder(id, "state.json");
    await runner.exec(
      id,
      `rm -f context; mkdir context; ln -s ${secret} context/link; ln -s /etc/shadow context/Shadow
       printf 'FROM ${engine.image}\\nCOPY . /seen\\n' >context/Dockerfile`,
    );
    const { container: built } = await rebuild(id, "links");
    expect(built.failureMessage).toBe("");
    expect(await runner.exec(id, "cat /seen/link /seen/Shadow 2>&1 | grep -c 'No such file'")).toBe("2");
  });

  const build = (context: string) => ({ build: { dockerfile: `../${context}/Dockerfile`, context: `../${context}` } });

  test.concurrent("a class of a host with an engine may ask for containers, one of a host without may not", async () => {
    const offered = (registration = plane.registrations.at(-1)) => {
      const field = registration?.configurationSchema?.environmentClasses.find(({ id }) => id === "isolation");
      return field?.type.case === "enum" ? field.type.value.values : undefined;
    };
    expect(offered(plane.registrations[0])).toEqual(["process", "container"]);
    const other = await FakeControlPlane.start();
    other.classConfiguration = plane.classConfiguration;
    const without = await TestRunner.create(other);
    await without.start();
    const id = other.create();
    const { status } = await other.until(id, (each) => each.status?.runnerAck !== undefined, "the answer");
    expect(offered(other.registrations[0])).toEqual(["process"]);
    expect(status?.runnerAck).toMatchObject({
      ...{ statusCode: AckCode.INVALID_RESOURCE, message: "isolation container is not offered by this runner" },
    });
    await without[Symbol.asyncDispose]();
    await other[Symbol.asyncDispose]();
  });

  test.concurrent("a class that keeps dev containers on the host is named where the file asks for a container", async () => {
    await using other = await FakeControlPlane.start();
    await using host = await TestRunner.create(other, git.host);
    await host.start({ containerEngine: "docker", dockerHost: engine.dockerHost });
    const warningOf = async (container: object) => {
      const files = { ".devcontainer/devcontainer.json": JSON.stringify(container) };
      const id = other.create(contentOf(fromGit((await git.createRepository(`c${++count}`, { files })).url)));
      return containerOf(await other.untilPhase(id, RUNNING)).container.warningMessage;
    };
    const warning =
      "the environment class keeps dev containers on the host: image and features of the dev container are ignored and commands run on the host";
    const build = { build: { dockerfile: "Dockerfile" } };
    for (const asked of [{ image: engine.image }, build, { features: { "a/b:1": {} } }]) {
      expect(await warningOf(asked)).toBe(warning);
    }
    expect(await warningOf({ features: {}, postCreateCommand: "true" })).toBe("");
  });

  test.concurrent("tasks and services run in the dev container, and on the host where they say so", async () => {
    await using stage = await startTestPlane();
    await liftQuotas(stage);
    await using host = await startHost(stage, { containerEngine: "docker", dockerHost: engine.dockerHost });
    const { id: classId } = await stage.admin.runnerConfiguration.createEnvironmentClass({
      ...{ runnerId: host.runnerId, displayName: "Contained", description: "For tests" },
      configuration: Object.entries(plane.classConfiguration).map(([key, value]) => ({ key, value })),
    });
    const user = await stage.addUser();
    const { client } = user;
    const { environment } = await client.environments.createEnvironment({
      spec: { machine: { class: classId }, devcontainer: { defaultDevcontainerImage: engine.image } },
    });
    const { id, status } = await reaches(client, environment?.id ?? "", RUNNING);
    expect(status?.devcontainer).toMatchObject({
      ...{ devcontainerFilePresence: Presence.GENERATED, containerName: nameOf(id), failureMessage: "" },
    });
    const logs = await createEnvironmentLogs(client, id);
    const ended = async (command: string, spec = {}) => {
      const task = await newTask(client, id, `task-${++count}`, [], { command, ...spec });
      const { id: executionId } = await startTask(client, task);
      const execution = await eventually(async () => {
        const read = await readExecution(client, executionId);
        return ENDED.has(read.status?.phase ?? 0) && read;
      }, "the end of the execution");
      return { status: execution.status, said: await logs.read(execution.status?.logUrl, "?follow=false") };
    };
    const env = [{ name: "GIVEN", source: { case: "value" as const, value: "it's given" } }];
    const inside = await ended("ls /usr 2>/dev/null || echo inside; echo $GIVEN; pwd; id -u; echo error >&2", { env });
    const { stdout } = await (await operations(client, id)).exec({ command: "pwd; id -u" });
    expect(inside.said).toBe(`inside\nit's given\n${stdout}error\n`);
    expect(inside.status?.phase).toBe(TaskExecutionPhase.SUCCEEDED);
    expect((await ended("exit 3")).status?.failureMessage).toContain("exited with code 3");
    const machine = { runsOn: { target: { case: "machine" as const, value: {} } } };
    expect((await ended("test -e /etc/hostname && echo host", machine)).said).toBe("host\n");

    const port = await freePort();
    const listen = `require("http").createServer((_, out) => out.end("from " + process.getuid())).listen(${port}, "127.0.0.1")`;
    // The image has no program that listens; this one needs nothing of it.
    const node = "$f/lib/ld-* --library-path $f/lib $f/node";
    const command = `f=$(echo ${host.dataDir}/container-runtime/*); setsid ${node} -e '${listen}' >/dev/null 2>&1 &`;
    await (await operations(client, id)).exec({ command });
    const url = await admitPort(user, id, port, AdmissionLevel.EVERYONE);
    await eventually(async () => (await fetch(url)).ok, "the port answers");
    expect(stdout).toContain((await (await fetch(url)).text()).replace("from ", ""));

    const commands = {
      start: "trap 'sleep 1; rm /tmp/up; echo bye; exit 0' TERM; echo up >/tmp/up; while :; do sleep 0.1; done",
      ready: "test -e /tmp/up",
    };
    const { id: serviceId } = await newService(client, id, "service", { commands });
    const isIn = (phase: ServicePhase) =>
      eventually(async () => (await readService(client, serviceId)).status?.phase === phase, ServicePhase[phase] ?? "");
    await client.environmentAutomation.startService({ id: serviceId });
    await isIn(ServicePhase.RUNNING);
    expect(await engine.docker("exec", nameOf(id), "cat", "/tmp/up")).toBe("up");
    await client.environmentAutomation.stopService({ id: serviceId });
    await isIn(ServicePhase.STOPPED);
    const { status: stopped } = await readService(client, serviceId);
    expect(await logs.read(stopped?.logUrl, "?follow=false")).toContain("bye\n");
    const left = await engine.docker("top", nameOf(id), "-o", "pid,args");
    expect(left).not.toContain("while :; do sleep 0.1");

    // A rebuild waits for what is in the container.
    await client.environmentAutomation.startService({ id: serviceId });
    await isIn(ServicePhase.RUNNING);
    const session = randomUUID();
    await client.environments.updateEnvironment({ environmentId: id, spec: { devcontainer: { session } } });
    await eventually(async () => {
      const { environment: read } = await client.environments.getEnvironment({ environmentId: id });
      const devcontainer = read?.status?.devcontainer;
      return devcontainer?.session === session && devcontainer.phase === DevContainerPhase.RUNNING;
    }, "the rebuild");
    const { status: afterRebuild } = await readService(client, serviceId);
    expect(afterRebuild).toMatchObject({ phase: ServicePhase.STOPPED, failureMessage: "" });
    expect(await logs.read(afterRebuild?.logUrl, "?follow=false")).toContain("bye\n");

    // What begins with the machine does not wait for the container.
    await newTask(client, id, "early", [], { command: "test -e /etc/hostname && echo host" }, ["postMachineStart"]);
    await client.environments.stopEnvironment({ environmentId: id });
    await reaches(client, id, STOPPED);
    await client.environments.startEnvironment({ environmentId: id });
    await reaches(client, id, RUNNING);
    const early = await eventually(async () => {
      const all = await executionsOf(client, id);
      return all.find(
        ({ metadata, status: each }) => metadata?.startedBy === "postMachineStart" && ENDED.has(each?.phase ?? 0),
      );
    }, "the execution at the start of the machine");
    expect(await logs.read(early.status?.logUrl, "?follow=false")).toBe("host\n");
  });

  test("a runner that is killed while it builds is followed by one that goes on, and nothing is left in the end", async () => {
    await using other = await FakeControlPlane.start();
    other.classConfiguration = plane.classConfiguration;
    await using killed = await TestRunner.create(other, git.host);
    const options = { containerEngine: "docker", dockerHost: engine.dockerHost } as const;
    const first = await killed.spawn(options);
    const files = {
      ".devcontainer/devcontainer.json": JSON.stringify({ build: { dockerfile: "Dockerfile" } }),
      ".devcontainer/Dockerfile": `FROM ${engine.image}\nRUN sleep 2; echo built >/built\n`,
    };
    const id = other.create(contentOf(fromGit((await git.createRepository(`c${++count}`, { files })).url)));
    const commands = () => engine.docker("ps", "--no-trunc", "--format", "{{.Command}}");
    await eventually(async () => (await commands()).includes("sleep 2"), "the build", 60_000);
    await first.kill();
    const second = await killed.spawn(options);
    const { container } = containerOf(await other.untilPhase(id, RUNNING));
    expect(container).toMatchObject({
      phase: DevContainerPhase.RUNNING,
      failureMessage: "",
      containerName: nameOf(id),
    });
    expect(await killed.exec(id, "cat /built")).toBe("built");
    const label = `label=berth.environment=${id}`;
    expect((await engine.docker("ps", "--all", "--quiet", "--filter", label)).split("\n")).toHaveLength(1);
    other.deleteEnvironment(id);
    await eventually(() => other.isGone(id), "the deletion");
    expect(await engine.docker("ps", "--all", "--quiet", "--filter", label)).toBe("");
    // The engine may have gone on with what nobody waits for any more: the next runner finds it.
    await second.kill();
    await killed.spawn(options);
    expect(await engine.docker("images", "--all", "--quiet", "--filter", label)).toBe("");
  });

  test("a container that goes is brought back, whoever has ended it, but not for ever", async () => {
    const { id, container } = await running({ image: engine.image, postStartCommand: "echo start >>~/order" });
    await runner.exec(id, "echo kept >/tmp/own");
    const answers = async (what: string) => {
      await eventually(async () => (await runner.exec(id, "cat /tmp/own")) === "kept", what, 60_000, 200);
      expect(containerOf(plane.environment(id)).container.containerId).toBe(container.containerId);
    };
    await engine.docker("kill", nameOf(id));
    await answers("the container after its death");
    await runner.running?.stop();
    // As a runner leaves it that was killed while it made a container of an environment that is gone by now.
    const labels = ["purpose=devcontainer", `runner=${runner.dataDir}`, `environment=${randomUUID()}`];
    const stray = labels.flatMap((label) => ["--label", `berth.${label}`]);
    await engine.docker("run", "--detach", "--name", "stray", "--network=none", ...stray, engine.image, "sleep", "600");
    await start();
    expect(await engine.docker("ps", "--all", "--quiet", "--filter", "name=stray")).toBe("");
    await answers("the container for the runner after this one");
    await engine.kill();
    await engine.start();
    await answers("the container after the engine's death");
    expect(await runner.exec(id, "cat ~/order")).toBe("start");
    for (let left = 2; left > 0; left--) {
      await engine.docker("kill", nameOf(id));
      if (left > 1) await answers("the container once more");
    }
    const { status } = await plane.until(
      id,
      ({ status }) => status?.devcontainer?.phase === DevContainerPhase.FAILED,
      "the failure",
    );
    expect(status?.devcontainer?.failureMessage).toContain("the container was lost more than 3 times");
    expect(status?.phase).toBe(RUNNING);
    const again = await rebuild(id, "after");
    expect(again.container).toMatchObject({ phase: DevContainerPhase.RUNNING, failureMessage: "" });
    expect(await runner.exec(id, "test -e /tmp/own || echo new")).toBe("new");
  });
});
