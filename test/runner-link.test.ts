import { existsSync } from "node:fs";
import { readdir, readFile, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { Code, ConnectError } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import {
  Directive,
  ReportResult_Outcome as Outcome,
  DeregisterRequest_Reason as Reason,
} from "../gen/berth/runner/v1/runner_control_pb.js";
import { EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { environmentProcesses } from "../src/runner/supervisor/processes.ts";
import { type GitServer, startGitServer } from "./harness/git-server.ts";
import { eventually } from "./harness/wait.ts";
import { FakeControlPlane, TestRunner } from "./runner-harness.ts";

const { RUNNING, STOPPED } = EnvironmentPhase;

vi.setConfig({ testTimeout: 120_000 });

let git: GitServer;
beforeAll(async () => {
  git = await startGitServer();
  await git.createRepository("acme/linked", { branches: { dev: { "x.txt": "x\n" } } });
});
afterAll(async () => {
  await git.close();
});

/** A control plane with a runner that has one environment running. */
async function linked() {
  const plane = await FakeControlPlane.start();
  const runner = await TestRunner.create(plane, git.host);
  const dispose = async () => {
    await runner[Symbol.asyncDispose]();
    await plane[Symbol.asyncDispose]();
  };
  const start = async () => {
    const running = await runner.start();
    const id = plane.create();
    await plane.untilPhase(id, RUNNING);
    return { running, id, user: (await runner.record(id)).user };
  };
  const { running, id, user } = await start().catch(async (error: unknown) => {
    await dispose();
    throw error;
  });
  const processes = () => environmentProcesses({ environmentId: id, uid: user?.own ? user.uid : undefined });
  return { plane, runner, running, id, processes, [Symbol.asyncDispose]: dispose };
}

test.concurrent("registering tells what the host is; the credential is kept and used again", async () => {
  await using it = await linked();
  const [first] = it.plane.registrations;
  expect(first).toMatchObject({ protocolVersion: 1, maxEnvironments: 10, localEnvironmentIds: [] });
  expect(first?.status?.publicKey).toHaveLength(32);
  expect(first?.configurationSchema?.environmentClasses.map(({ id }) => id)).toContain("cpu");
  const file = join(it.runner.dataDir, "credentials.json");
  expect((await stat(file)).mode & 0o777).toBe(0o600);
  expect(await readFile(file, "utf8")).not.toContain(it.plane.exchangeToken);
  await it.running.stop();
  await it.runner.start();
  await eventually(() => it.plane.registrations.length === 2, "the second link");
  expect(it.plane.registrations[1]?.status?.publicKey).toEqual(first?.status?.publicKey);
  const log = it.runner.lines.join("");
  expect(log).not.toContain(it.plane.exchangeToken);
  expect(log).not.toMatch(/berth_(rat|env|eat)_/);
});

test.concurrent("an outage of the control plane stops nothing; afterwards the newest state is reported", async () => {
  await using it = await linked();
  const { plane, runner, id } = it;
  const token = plane.grant(id, 2);
  expect((await runner.ops(id, token).exec({ command: "true" })).exitCode).toBe(0);
  await plane.outage();
  const { supervisor } = await runner.record(id);
  process.kill(supervisor?.pid ?? 0, "SIGKILL");
  await eventually(async () => (await runner.record(id)).supervisor?.pid !== supervisor?.pid, "another supervisor");
  const asked = runner.ops(id, plane.grant(id, 2)).exec({ command: "true" });
  await expect(asked).rejects.toMatchObject({ code: Code.Unavailable });
  await plane.back();
  plane.stopEnvironment(id);
  await plane.untilPhase(id, STOPPED);
  expect(plane.registrations).toHaveLength(1);
});

test.concurrent("a stream that ends is taken up where it was, without a new picture", async () => {
  await using it = await linked();
  const other = it.plane.create();
  await it.plane.untilPhase(other, RUNNING);
  it.plane.cutStreams();
  it.plane.stopEnvironment(it.id);
  await it.plane.untilPhase(it.id, STOPPED);
  expect(it.plane.resumed.slice(1).every((revision) => revision > 0n)).toBe(true);
  expect(it.plane.resumed.length).toBeGreaterThan(1);
  expect(it.plane.environment(other).status?.phase).toBe(RUNNING);
});

test.concurrent("RUN-14: a runner whose link was replaced ends, and its environments go on", async () => {
  await using it = await linked();
  await it.plane.replaceLink();
  expect(await it.running.finished).toBe("replaced");
  expect(await it.processes()).not.toEqual([]);
});

test.concurrent("a credential that is refused ends all processes and keeps the files", async () => {
  await using it = await linked();
  await it.runner.exec(it.id, "echo kept > ../workspace/note; sleep 600 >/dev/null 2>&1 &");
  it.plane.revokeRunner();
  expect(await it.running.finished).toBe("refused");
  expect(await it.processes()).toEqual([]);
  expect(await readFile(it.runner.folder(it.id, "workspace/note"), "utf8")).toBe("kept\n");
});

test.concurrent("one refusal alone is not believed", async () => {
  await using it = await linked();
  it.plane.failOnce(Code.Unauthenticated);
  it.plane.failOnce(Code.Aborted);
  it.plane.stopEnvironment(it.id);
  await it.plane.untilPhase(it.id, STOPPED);
});

test.concurrent("a wrong exchange token ends the runner", async () => {
  await using plane = await FakeControlPlane.start();
  await using runner = await TestRunner.create(plane);
  runner.exchangeToken = "berth_rxt_wrong";
  const running = await runner.start();
  expect(await running.finished).toBe("refused");
});

test.concurrent("the access token is renewed when two thirds of its life are over", async () => {
  await using it = await linked();
  await it.running.stop();
  const file = join(it.runner.dataDir, "credentials.json");
  const stored = JSON.parse(await readFile(file, "utf8"));
  await writeFile(file, JSON.stringify({ ...stored, issuedAt: Date.now() - 61 * 24 * 60 * 60_000 }));
  await it.runner.start();
  await eventually(() => it.plane.exchanges === 2, "the exchange");
  const renewed = await eventually(async () => {
    const { accessToken } = JSON.parse(await readFile(file, "utf8"));
    return accessToken !== stored.accessToken && accessToken;
  }, "the new token on disk");
  expect(renewed).toMatch(/^berth_rat_/);
  it.plane.stopEnvironment(it.id);
  await it.plane.untilPhase(it.id, STOPPED);
});

test.concurrent("a damaged credential is told apart from a refused one", async () => {
  await using it = await linked();
  await it.running.stop();
  await writeFile(join(it.runner.dataDir, "credentials.json"), "{");
  await expect(it.runner.start()).rejects.toThrow(/credentials\.json is damaged/);
});

test.concurrent("a runner that was deleted ends its environments and says goodbye", async () => {
  await using it = await linked();
  it.plane.directive = Directive.SHUTDOWN;
  expect(await it.running.finished).toBe("deleted");
  expect(it.plane.deregistered).toEqual([Reason.DELETED]);
  expect(await it.processes()).toEqual([]);
});

test.concurrent("a draining runner starts nothing new until it may again", async () => {
  await using it = await linked();
  it.plane.directive = Directive.DRAIN;
  const beats = it.plane.heartbeats;
  await eventually(() => it.plane.heartbeats > beats + 1, "heartbeats");
  const id = it.plane.create();
  const seen = it.plane.heartbeats;
  await eventually(() => it.plane.heartbeats > seen + 3, "more heartbeats");
  expect(existsSync(it.runner.folder(id))).toBe(false);
  expect(it.plane.environment(it.id).status?.phase).toBe(RUNNING);
  it.plane.directive = Directive.UNSPECIFIED;
  await it.plane.untilPhase(id, RUNNING);
});

test.concurrent("RUN-19: an unknown environment is set aside, a removed one erased", async () => {
  await using it = await linked();
  const { plane, runner, running, id } = it;
  const removed = plane.create();
  await plane.untilPhase(removed, RUNNING);
  await running.stop();
  expect(await it.processes()).not.toEqual([]);
  plane.lose(id);
  plane.deleteEnvironment(removed, true);
  await runner.start();
  await eventually(() => !existsSync(runner.folder(id)) && !existsSync(runner.folder(removed)), "both to go");
  const aside = await readdir(join(runner.dataDir, "quarantine"));
  expect(aside).toHaveLength(1);
  expect(aside[0]?.startsWith(`${id}.`)).toBe(true);
  expect(existsSync(join(runner.dataDir, "quarantine", aside[0] ?? "", "workspace"))).toBe(true);
  expect(await it.processes()).toEqual([]);
  expect(await environmentProcesses({ environmentId: removed })).toEqual([]);
});

test.concurrent("RUN-19: another control plane is refused, and nothing is set aside", async () => {
  await using it = await linked();
  await it.running.stop();
  it.plane.controlPlaneId = uuidv7();
  it.plane.lose(it.id);
  const again = await it.runner.start();
  expect(await again.finished).toBe("refused");
  expect(existsSync(it.runner.folder(it.id))).toBe(true);
  expect(await readdir(join(it.runner.dataDir, "quarantine"))).toEqual([]);
});

test.concurrent("a report for an environment of somebody else leads to its being set aside", async () => {
  await using it = await linked();
  it.plane.lose(it.id);
  // A dev container file that appears is news to report; some other report may have been refused already.
  await it.runner.exec(it.id, "echo '{}' > .devcontainer.json").catch((error: unknown) => {
    if (ConnectError.from(error).code !== Code.Unavailable) throw error;
  });
  await eventually(() => it.plane.reports.at(-1)?.outcome === Outcome.NOT_ASSIGNED, "the refused report");
  await eventually(() => !existsSync(it.runner.folder(it.id)), "the folder to be set aside");
  expect(await readdir(join(it.runner.dataDir, "quarantine"))).toHaveLength(1);
});

test.concurrent("calls are answered, and answered the same when they are repeated", async () => {
  await using it = await linked();
  const [good, bad] = [uuidv7(), uuidv7()];
  it.plane.ask(good, `${git.webUrl("acme/linked")}/src/branch/dev`);
  it.plane.ask(bad, "https://127.0.0.1/x/y");
  await eventually(() => it.plane.completed.length === 2, "two answers");
  const answerTo = (callId: string) => it.plane.completed.filter((each) => each.callId === callId);
  const [answer] = answerTo(good);
  expect(answer?.outcome.case === "parseContext" && answer.outcome.value.response?.git?.branch).toBe("dev");
  expect(answerTo(bad)[0]?.outcome).toMatchObject({ case: "failure", value: { code: Code.InvalidArgument } });
  const requests = git.requests.length;
  it.plane.ask(good, `${git.webUrl("acme/linked")}/src/branch/dev`);
  await eventually(() => answerTo(good).length === 2, "the repeated answer");
  expect(answerTo(good)[1]?.outcome).toEqual(answer?.outcome);
  expect(git.requests.length).toBe(requests);
});

test.concurrent("a report that cannot be read does not hold up the others", async () => {
  await using it = await linked();
  const poisoned = it.plane.create();
  it.plane.malformed = poisoned;
  const other = it.plane.create();
  await it.plane.untilPhase(other, RUNNING);
});
