import { readFile } from "node:fs/promises";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { IntrospectTokenResponse_Kind as Kind } from "../gen/berth/runner/v1/runner_control_pb.js";
import {
  EnvironmentStatus_RunnerACK_StatusCode as AckCode,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  type Environment,
  EnvironmentPhase,
} from "../gen/gitpod/v1/environment_pb.js";
import { engineMissing, startContainerEngine, type TestEngine } from "./harness/container-engine.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { eventually } from "./harness/wait.ts";
import { contentOf, FakeControlPlane, fromGit, TestRunner } from "./runner-harness.ts";

// Dev containers that run in a container: a real runner and a real engine that nobody else uses.

const { RUNNING, STOPPED } = EnvironmentPhase;
const missing = engineMissing();

vi.setConfig({ testTimeout: 120_000, hookTimeout: 120_000 });

type Files = Record<string, string>;

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
    const { id, container, status } = await running({
      image: engine.image,
      remoteUser: "dev",
      containerEnv: { KIND: "contained" },
      // biome-ignore lint/suspicious/noTemplateCurlyInString: dev container files have such variables.
      remoteEnv: { MORE: "${containerEnv:KIND}-more", HOST: "${localEnv:PATH}" },
      initializeCommand: "[ -e /etc/hostname ] && echo host >~/initialized",
      onCreateCommand: "id -un >~/created; ls / >~/seen",
      postStartCommand: "echo start >>~/started",
      postAttachCommand: "echo $KIND $MORE $HOST. >~/attached",
    });
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
      [{ image: engine.image, features: { "ghcr.io/devcontainers/features/go:1": {} } }, "features"],
      [build({ dockerfile: "../../Dockerfile" }), "build.dockerfile leads out of the checkout"],
      [build({ context: "../.." }), "build.context leads out of the checkout"],
      [build({ context: "/" }), "build.context leads out of the checkout"],
      [{ image: "--privileged" }, "image is not an image reference"],
      [{ image: "berth.test/missing:1" }, "image berth.test/missing:1 could not be pulled"],
      [build({}), "non-zero code: 7", { ".devcontainer/Dockerfile": `FROM ${engine.image}\nRUN ${link}; exit 7\n` }],
      [{ image: engine.bareImage }, "could not be started"],
    ];
    await Promise.all(
      cases.map(async ([file, reason, files]) => {
        const { id, container, status } = await running(file, files);
        expect.soft(container.failureMessage).toContain(reason);
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
    await start();
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
