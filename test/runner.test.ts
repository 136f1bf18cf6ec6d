import { expect, test } from "vitest";
import { EnvironmentPhase } from "../gen/gitpod/v1/environment_pb.js";
import { startGitServer } from "./harness/git-server.ts";
import { contentOf, FakeControlPlane, fromGit, TestRunner } from "./runner-harness.ts";

test("ENV-1, ENV-10, ENV-11, ENV-22: clone, run, stop, start, delete", async () => {
  const git = await startGitServer();
  const repository = await git.createRepository("hello");
  await using plane = await FakeControlPlane.start();
  await using runner = await TestRunner.create(plane, git.host);
  await runner.start();
  const id = plane.create(contentOf(fromGit(repository.url)));
  const running = await plane.untilPhase(id, EnvironmentPhase.RUNNING);
  console.log(JSON.stringify(running.status, (_k, v) => (typeof v === "bigint" ? String(v) : v), 1));
  console.log(await runner.exec(id, "pwd; id; env; ls -la; git status; ls -la ~ .. /"));
  await git.close();
});
