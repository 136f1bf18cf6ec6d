import { existsSync } from "node:fs";
import { chmod, mkdir, mkdtemp, readFile, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pino } from "pino";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { isImageReference } from "../src/domain/image-reference.ts";
import type { ContainerEngine, ContainerSpec, EngineChoice } from "../src/runner/containers/engine.ts";
import { type ContainerSite, EnvironmentContainers } from "../src/runner/containers/environment-containers.ts";
import { EngineAccess } from "../src/runner/containers/find.ts";
import { environmentPaths } from "../src/runner/paths.ts";
import { isAlive, readProcess, userOf } from "../src/runner/supervisor/processes.ts";
import { engineMissing, startContainerEngine, type TestEngine } from "./harness/container-engine.ts";
import { eventually } from "./harness/wait.ts";

// Engines by their command line: how one is found, and what the runner asks of it.

const missing = engineMissing();
const UID = 61_234;

let folder: string;
const logged: string[] = [];
const log = pino({ level: "info" }, { write: (line: string) => void logged.push(line) });

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "berth-containers-"));
  await chmod(folder, 0o711);
});

afterAll(async () => {
  await rm(folder, { recursive: true, force: true });
});

async function access(choice: EngineChoice, dockerHost?: string): Promise<EngineAccess> {
  const found = await EngineAccess.open({ choice, dockerHost }, folder, log);
  found.close();
  return found;
}

test("what names an image, and what does not", () => {
  const digest = `sha256:${"a".repeat(64)}`;
  const good = ["redis", "redis:7", "library/redis", "localhost:5000/a/b_c/d.e:v1.2-3", `ghcr.io/a/b@${digest}`];
  expect(good.filter((text) => !isImageReference(text))).toEqual([]);
  const bad = [
    "",
    "-v",
    "--privileged",
    "redis:",
    "redis 7",
    "a\nb",
    "a//b",
    "../b",
    "redis:-x",
    "Redis",
    "a@sha256:1",
  ];
  expect(bad.filter(isImageReference)).toEqual([]);
});

test("what an environment asks for is checked, and is bounded", async () => {
  const run = (number: number) => `${number}`.padStart(24, "0");
  const engines = await access("none");
  const containers = new EnvironmentContainers({
    ...{ host: { engines, config: { name: "here", dataDir: folder }, log }, id: "e", folder, settings: undefined },
    ...{ paths: environmentPaths(folder, "e"), record: {} },
  } as unknown as ContainerSite);
  containers.open();
  const start = (name: string, image = "redis") => containers.start(name, image, () => undefined);
  for (const name of ["", "../../etc", "-v", run(1).slice(1), `${run(1)}-stop`]) {
    await expect(start(name)).rejects.toThrow("is not the name of a run");
  }
  await expect(start(run(1), "--privileged")).rejects.toThrow("is not an image reference");
  const names = { run: run(1), part: "0123456789ab", mark: `${run(1)}-stop` };
  for (const bad of [{ part: "../stop" }, { part: "" }, { mark: "x=y" }, { run: "--help" }]) {
    const { run: main, part, mark } = { ...names, ...bad };
    await expect(containers.exec(main, part, mark)).rejects.toThrow("is not the name of a run");
  }
  await containers.remove("../../etc");
  for (let number = 0; number < 300; number++) {
    await expect(start(run(number))).rejects.toThrow("needs a container engine; none found on runner here");
  }
  await expect(start(run(300))).rejects.toThrow("at most 300 containers");
  await containers.remove(run(7));
  await expect(start(run(300))).rejects.toThrow("needs a container engine");
  await containers.keepOnly([]);
  await expect(start(run(301))).rejects.toThrow("needs a container engine");
});

describe("without an engine", () => {
  test("none is looked for where none is wanted", async () => {
    const engines = await access("none");
    expect(await engines.find()).toBeUndefined();
    expect(engines.problem).toContain("BERTH_RUNNER_CONTAINER_ENGINE");
  });

  test("one that is asked for and does not answer is told, with why", async () => {
    const engines = await access("docker", `unix://${join(folder, "nothing")}`);
    expect(engines.present).toBeUndefined();
    expect(engines.problem).not.toBe("");
    expect(logged.join("")).toContain("does not answer; it is looked for again");
  });

  test("an engine on another machine does not count", async () => {
    const engines = await access("docker", "tcp://127.0.0.1:1");
    expect(engines.problem).toContain("no Unix socket of this host");
  });
});

describe.skipIf(missing)(`with an engine${missing ? ` (${missing})` : ""}`, () => {
  let engine: TestEngine;
  let engines: EngineAccess;
  let containers: ContainerEngine;

  beforeAll(async () => {
    engine = await startContainerEngine();
    engines = await access("auto", engine.dockerHost);
    const found = await engines.find();
    if (!found) throw new Error(engines.problem);
    containers = found;
  });

  afterAll(async () => {
    await engine?.[Symbol.asyncDispose]();
  });

  async function specOf(name: string, command: string, more: Partial<ContainerSpec> = {}): Promise<ContainerSpec> {
    const shared = join(folder, `${name}, "shared"`);
    await mkdir(shared, { recursive: true });
    await writeFile(join(shared, "here"), name);
    await chmod(shared, 0o777);
    return {
      ...{ image: engine.image, name, labels: { "berth.test": name }, user: { uid: UID, gid: UID } },
      ...{ mounts: [{ source: shared, target: shared }], workingDirectory: shared },
      ...{ entrypoint: "sh", args: ["-c", command], variables: { GIVEN: "a b" }, hostNetwork: true },
      ...{ limits: { cpuCores: 1000, memoryMib: 64, processes: 100 }, removeAtEnd: true },
      ...more,
    };
  }

  test("a container runs as its user in its folder, without privileges, and is gone when it has ended", async () => {
    const spec = await specOf(
      "runs",
      'echo "$GIVEN $(id -u) $(cat here)" > told; cat /proc/self/limits /proc/self/status >> told; exec sleep 300',
    );
    const id = await containers.run(spec);
    const state = await containers.inspect("runs");
    expect(state).toMatchObject({ id, name: "runs", isRunning: true, labels: { "berth.test": "runs" } });
    const pid = state?.pid ?? 0;
    expect(userOf(pid)).toBe(UID);
    const told = join(spec.workingDirectory, "told");
    const text = await eventually(async () => {
      const found = existsSync(told) ? await readFile(told, "utf8") : "";
      return found.includes("NoNewPrivs") ? found : undefined;
    }, "the container has told");
    expect(text.split("\n")[0]).toBe(`a b ${UID} runs`);
    expect(text).toMatch(/Max processes\s+100\s+100\s/);
    expect(text).toMatch(/CapBnd:\s0+\n/);
    expect(text).toMatch(/NoNewPrivs:\s1\n/);
    expect((await stat(told)).uid).toBe(UID);
    expect((await containers.list({ "berth.test": "runs" })).map((each) => each.id)).toEqual([id]);
    expect(await containers.list({ "berth.test": "others" })).toEqual([]);
    process.kill(pid, "SIGKILL");
    await eventually(async () => (await containers.inspect("runs")) === undefined, "the container is gone");
  });

  test("a command is started beside what runs, and both end with the container", async () => {
    const spec = await specOf("beside", "exec sleep 300");
    const id = await containers.run(spec);
    await containers.exec(id, {
      ...{ user: spec.user, workingDirectory: spec.workingDirectory, variables: { WHAT: "x" } },
      argv: ["sh", "-c", 'echo "$WHAT $(id -u)" > beside; exec sleep 300'],
    });
    const file = join(spec.workingDirectory, "beside");
    await eventually(async () => (await readFile(file, "utf8").catch(() => "")) === `x ${UID}\n`, "the command ran");
    const pid = (await containers.inspect(id))?.pid ?? 0;
    const leader = { pid, startTime: readProcess(pid)?.startTime ?? 0 };
    await containers.stop(id, 1);
    expect(isAlive(leader)).toBe(false);
    await containers.stop(id, 1);
    await containers.remove(id);
    expect(await containers.inspect(id)).toBeUndefined();
  });

  test("what cannot be fetched fails soon and says why; nothing else is taken for an image", async () => {
    const lines: string[] = [];
    const pull = (image: string) =>
      containers.pull(image, { onLines: (batch) => lines.push(...batch), timeoutMs: 30_000 });
    expect(await containers.hasImage(engine.image)).toBe(true);
    expect(await containers.hasImage("berth.test/other:1")).toBe(false);
    await expect(pull("127.0.0.1:1/nothing:1")).rejects.toThrow(/connection refused/);
    expect(lines.join("\n")).toContain("connection refused");
    await expect(pull("--all-tags")).rejects.toThrow("is not an image reference");
    await expect(containers.run(await specOf("option", "", { image: "-v=/:/host" }))).rejects.toThrow("reference");
    await expect(containers.run(await specOf("absent", "", { image: "berth.test/absent:1" }))).rejects.toThrow(/image/);
    await expect(containers.inspect("--help")).rejects.toThrow("name");
    await expect(containers.run(await specOf("shell", "", { image: engine.bareImage }))).rejects.toThrow(/"sh"/);
    expect(await containers.inspect("shell")).toBeUndefined();
  });

  test("an engine that goes is noticed, and so is one that comes back", async () => {
    await engine.kill();
    const gone = await access("docker", engine.dockerHost);
    expect(gone.present).toBeUndefined();
    expect(gone.problem).toMatch(/daemon/);
    let appeared: ContainerEngine | undefined;
    gone.onAppear((found) => {
      appeared = found;
    });
    await engine.start();
    expect((await gone.find())?.name).toBe("docker");
    expect(appeared?.name).toBe("docker");
  });
});
