import { execFile } from "node:child_process";
import { randomBytes, randomUUID } from "node:crypto";
import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { getCACertificates, setDefaultCACertificates } from "node:tls";
import { promisify } from "node:util";
import { toJsonString } from "@bufbuild/protobuf";
import { timestampFromMs } from "@bufbuild/protobuf/wkt";
import { Code } from "@connectrpc/connect";
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from "vitest";
import {
  CreateEnvironmentPreconditionFailureDetailsSchema,
  EnvironmentPhase,
  EnvironmentSchema,
} from "../gen/gitpod/v1/environment_pb.js";
import { HostAuthenticationTokenSource as Source } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { createEnvironment, getEnvironment, operations, reaches } from "./harness/environments.ts";
import { type GitServer, type Repository, startGitServer } from "./harness/git-server.ts";
import { startHost, type TestHost } from "./harness/host.ts";
import { liftQuotas, startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal } from "./harness/refusal.ts";
import { newAuthority, type TestAuthority } from "./harness/tls.ts";
import { eventually } from "./harness/wait.ts";

// Git in environments with the credential that their creator holds for a host: real git, over TLS, for real.

const TIMEOUT_MS = 120_000;
const TOKEN = `canary-${randomBytes(12).toString("hex")}`;
const isRoot = process.getuid?.() === 0;
const run = promisify(execFile);

let authority: TestAuthority;
let git: GitServer;
let plane: TestPlane;
let host: TestHost;
let creator: TestUser;
let repository: Repository;

beforeAll(async () => {
  authority = await newAuthority();
  process.env.GIT_SSL_CAINFO = authority.file;
  // Tokens are renewed by requests of the runner's own.
  setDefaultCACertificates([...getCACertificates("default"), authority.cert]);
  git = await startGitServer(authority);
  repository = await git.createRepository("team/private", {
    ...{ private: { user: "git", password: TOKEN }, branches: { topic: { "topic.txt": "topic\n" } } },
  });
  plane = await startTestPlane({ BERTH_SCM_ALLOW_HOSTS: git.host });
  await liftQuotas(plane);
  host = await startHost(plane, { gitHosts: [git.host] });
  creator = await plane.addUser();
  await plane.admin.runnerConfiguration.createSCMIntegration({
    ...{ runnerId: host.runnerId, host: git.host, scmId: "git", pat: true },
  });
}, TIMEOUT_MS);

afterAll(async () => {
  expect(plane.logged()).not.toContain(TOKEN);
  expect(host.logged()).not.toContain(TOKEN);
  await host[Symbol.asyncDispose]();
  await plane[Symbol.asyncDispose]();
  await git.close();
  await authority[Symbol.asyncDispose]();
  delete process.env.GIT_SSL_CAINFO;
}, TIMEOUT_MS);

/** Stores a credential for the host; the id of the token. */
async function signIn(user: TestUser, token = TOKEN): Promise<string> {
  const stored = await user.client.runnerConfiguration.createHostAuthenticationToken({
    ...{ runnerId: host.runnerId, host: git.host, token, source: Source.PAT },
  });
  return stored.token?.id ?? "";
}

const create = (user: TestUser) => createEnvironment(user.client, host.classId, git.url("team/private"));

/** Somebody who holds the credential. */
async function signedIn(): Promise<TestUser> {
  const user = await plane.addUser();
  await signIn(user);
  return user;
}

/** Runs a command in an environment; its output without a line end. */
async function exec(user: TestUser, id: string, command: string): Promise<string> {
  const { exitCode, stdout, stderr } = await (await operations(user.client, id)).exec({ command });
  if (exitCode !== 0) throw new Error(`${command} ended with ${exitCode}: ${stderr}`);
  return stdout.trim();
}

/** Command lines and variables of all processes of this machine that can be read. */
async function processTexts(): Promise<string> {
  const pids = (await readdir("/proc")).filter((name) => /^\d+$/.test(name));
  const files = pids.flatMap((pid) => [`/proc/${pid}/cmdline`, `/proc/${pid}/environ`]);
  const texts = await Promise.all(files.map((file) => readFile(file, "utf8").catch(() => "")));
  return texts.join("\n");
}

/** A process works at an address, and neither it nor any other shows the token. */
async function nothingShows(url: string): Promise<void> {
  const texts = await processTexts();
  expect(texts).toContain(url);
  expect(texts).not.toContain(TOKEN);
}

/** Files below the folder of an environment in which the token is, relative to it. */
async function filesWithToken(id: string): Promise<string[]> {
  const folder = join(host.dataDir, "environments", id);
  const found = await run("grep", ["-rlaF", "--devices=skip", "-e", TOKEN, folder]).catch(() => ({ stdout: "" }));
  return found.stdout.split("\n").flatMap((path) => (path ? [path.slice(folder.length + 1)] : []));
}

async function logOf(user: TestUser, id: string): Promise<string> {
  const { accessToken } = await user.client.environments.createEnvironmentLogsToken({ environmentId: id });
  const { status } = await getEnvironment(user.client, id);
  const headers = { authorization: `Bearer ${accessToken}` };
  return await (await fetch(`${status?.environmentUrls?.logs}?follow=false`, { headers })).text();
}

describe("a private repository", () => {
  test(
    "ENV-7 is cloned for its creator once they have signed in to the host, and fetched and pushed to inside",
    async () => {
      const error = await refusal(create(creator));
      expect(Code[error.code]).toBe("FailedPrecondition");
      const [detail] = error.findDetails(CreateEnvironmentPreconditionFailureDetailsSchema);
      expect(detail?.missingAuthenticationTokensForHosts).toEqual([git.host]);

      await signIn(creator);
      git.holdRequests();
      const id = await create(creator);
      await git.held();
      await nothingShows(repository.url);
      git.release();
      await reaches(creator.client, id, EnvironmentPhase.RUNNING);
      expect(await exec(creator, id, "cat README.md; git remote get-url origin")).toBe(
        `# team/private\n${repository.url}`,
      );

      await exec(
        creator,
        id,
        "echo more > more && git add more && git commit -qm 'More from inside' && git push -q origin HEAD",
      );
      const { stdout } = await run("git", [
        "-c",
        "safe.directory=*",
        "-C",
        repository.directory,
        "log",
        "-1",
        "--format=%s",
        "main",
      ]);
      expect(stdout).toBe("More from inside\n");

      const pushed = await git.commit("team/private", { files: { "later.txt": "later\n" }, message: "From elsewhere" });
      git.holdRequests();
      await exec(creator, id, "(git pull -q --ff-only > /dev/null 2> pulled; echo $? >> pulled) > /dev/null 2>&1 &");
      await git.held();
      await nothingShows(repository.url);
      git.release();
      await eventually(async () => (await exec(creator, id, "cat pulled")) === "0", "the pull has ended");
      expect(await exec(creator, id, "git rev-parse HEAD; git status --short later.txt; cat later.txt")).toBe(
        `${pushed}\nlater`,
      );

      expect(
        await exec(creator, id, "cat .git/config ~/.gitconfig; env; git config --list --show-origin"),
      ).not.toContain(TOKEN);
      const files = await filesWithToken(id);
      expect(files).toHaveLength(1);
      expect(files[0]).toMatch(/^secrets\//);
      expect(toJsonString(EnvironmentSchema, await getEnvironment(creator.client, id))).not.toContain(TOKEN);
      const log = await logOf(creator, id);
      expect(log).toContain("Cloning");
      expect(log).not.toContain(TOKEN);
    },
    TIMEOUT_MS,
  );

  test("is found by its context URL for whoever has signed in, and for nobody else", async () => {
    const contextUrl = git.webUrl("team/private");
    const { runnerId } = host;
    const owner = await signedIn();
    const found = await owner.client.runners.parseContextURL({ contextUrl, runnerId });
    expect(found.git).toMatchObject({ cloneUrl: expect.stringContaining(contextUrl), branch: "main" });
    const member = await plane.addUser();
    expect(await codeOf(member.client.runners.parseContextURL({ contextUrl, runnerId }))).toBe("NotFound");
    const { environment } = await owner.client.environments.createEnvironment({
      spec: {
        machine: { class: host.classId },
        content: {
          initializer: { specs: [{ spec: { case: "contextUrl", value: { url: `${contextUrl}/src/branch/topic` } } }] },
        },
      },
    });
    const id = environment?.id ?? "";
    await reaches(owner.client, id, EnvironmentPhase.RUNNING);
    expect(await exec(owner, id, "git branch --show-current; cat topic.txt")).toBe("topic\ntopic");
  });

  test("is not cloned with a token that the host refuses, which nobody gets to see", async () => {
    const member = await plane.addUser();
    await signIn(member, `${TOKEN}-but-wrong`);
    const id = await create(member);
    const { status } = await eventually(async () => {
      const environment = await getEnvironment(member.client, id);
      return environment.status?.failureMessage.length ? environment : undefined;
    }, "the environment has failed");
    expect(status?.failureMessage.join()).toMatch(/authentication needed for 127\.0\.0\.1$/);
    expect(await logOf(member, id)).not.toContain(TOKEN);
    expect(git.requests.some(({ authorization }) => authorization?.startsWith("Basic "))).toBe(true);
  });

  test("RUN-32 opens and closes to an environment that runs as its creator stores, renews and deletes the credential", async () => {
    const member = await plane.addUser();
    const tokens = member.client.runnerConfiguration;
    const { environment } = await member.client.environments.createEnvironment({
      spec: { machine: { class: host.classId } },
    });
    const id = environment?.id ?? "";
    await reaches(member.client, id, EnvironmentPhase.RUNNING);
    const answer = async () =>
      await exec(member, id, `GIT_TERMINAL_PROMPT=0 git ls-remote -q ${repository.url} main > /dev/null 2>&1; echo $?`);
    const becomes = (open: boolean, what: string) =>
      eventually(async () => ((await answer()) === "0") === open, what, TIMEOUT_MS);

    const tokenId = await signIn(member, `${TOKEN}-but-wrong`);
    await tokens.updateHostAuthenticationToken({ id: tokenId, token: TOKEN });
    const specs = [{ spec: { case: "git" as const, value: { remoteUri: repository.url } } }];
    const session = randomUUID();
    await member.client.environments.updateEnvironment({
      ...{ environmentId: id, spec: { content: { session, initializer: { specs } } } },
    });
    await eventually(async () => {
      const { status } = await getEnvironment(member.client, id);
      return status?.content?.session === session && status.phase === EnvironmentPhase.RUNNING;
    }, "the repository has been cloned with the credential that was stored while the environment ran");
    expect(await answer()).toBe("0");

    await tokens.updateHostAuthenticationToken({ id: tokenId, token: `${TOKEN}-but-wrong` });
    await becomes(false, "git uses the credential that was changed");
    await tokens.updateHostAuthenticationToken({ id: tokenId, token: TOKEN });
    await becomes(true, "git uses the credential that was renewed");
    await tokens.deleteHostAuthenticationToken({ id: tokenId });
    await becomes(false, "git has no credential");
    expect(await filesWithToken(id)).toEqual([]);
    await signIn(member);
    await becomes(true, "git uses the credential that was stored");
  });

  test(
    "RUN-33 of five clones with a token that has ended exactly one renews it, and all succeed; later renewals come in time",
    async () => {
      const forge = await startGitServer(authority);
      onTestFinished(() => forge.close());
      const passwords = [1, 2].map((count) => `${TOKEN}-renewed-${count}`);
      const secret = `${TOKEN}-client`;
      await forge.createRepository("team/app", { private: { user: "oauth2", password: passwords[0] ?? "" } });
      const forms: Record<string, string>[] = [];
      forge.answer("/oauth/token", (_request, body) => {
        const access = passwords[forms.length];
        forms.push(Object.fromEntries(new URLSearchParams(body)));
        if (!access) return { status: 400, body: JSON.stringify({ error: "invalid_grant" }) };
        const renewed = {
          access_token: access,
          refresh_token: `${TOKEN}-refresh-${forms.length}`,
          expires_in: 7200,
        };
        return { status: 200, body: JSON.stringify(renewed) };
      });
      await using own = await startHost(plane, { gitHosts: [forge.host] });
      const { runnerId } = own;
      await plane.admin.runnerConfiguration.createSCMIntegration({
        ...{ runnerId, host: forge.host, scmId: "gitlab", oauthClientId: "berth", oauthPlaintextClientSecret: secret },
      });
      const member = await plane.addUser();
      const tokens = member.client.runnerConfiguration;
      const ends = Date.now() + 1_000;
      const { token } = await tokens.createHostAuthenticationToken({
        ...{
          runnerId,
          host: forge.host,
          source: Source.OAUTH,
          token: `${TOKEN}-old`,
          refreshToken: `${TOKEN}-refresh`,
        },
        expiresAt: timestampFromMs(ends),
      });
      await eventually(() => Date.now() > ends, "the token has ended");
      const ids = await Promise.all(
        Array.from({ length: 5 }, () => createEnvironment(member.client, own.classId, forge.url("team/app"))),
      );
      for (const id of ids) await reaches(member.client, id, EnvironmentPhase.RUNNING);
      const form = { grant_type: "refresh_token", client_id: "berth", client_secret: secret };
      expect(forms[0]).toEqual({ ...form, refresh_token: `${TOKEN}-refresh` });
      const [id = ""] = ids;
      // Five minutes before it ends the next one comes and counts for git inside, without anybody asking.
      await tokens.updateHostAuthenticationToken({
        id: token?.id ?? "",
        expiresAt: timestampFromMs(Date.now() + 301_000),
      });
      const credential = `printf 'protocol=https\\nhost=${forge.host}\\n' | GIT_TERMINAL_PROMPT=0 git credential fill`;
      await eventually(
        async () => (await exec(member, id, credential)).includes(passwords[1] ?? ""),
        "the next token",
        TIMEOUT_MS,
      );
      expect(forms.slice(1)).toEqual([{ ...form, refresh_token: `${TOKEN}-refresh-1` }]);
      // A host that does not renew it any more ends it.
      await plane.plane.app.db
        .write`update host_tokens set expires_at = now() + interval '2 minutes' where id = ${token?.id}`;
      await createEnvironment(member.client, own.classId, forge.url("team/app"));
      await eventually(async () => {
        const missing = createEnvironment(member.client, own.classId, forge.url("team/app"));
        return (await codeOf(missing)) === "FailedPrecondition";
      }, "the token counts no more");
      expect(forms).toHaveLength(3);
      expect(own.logged()).not.toContain(TOKEN);
    },
    TIMEOUT_MS,
  );

  test("stays closed to the environments of others, also on the same machine", async () => {
    const owner = await signedIn();
    const id = await create(owner);
    await reaches(owner.client, id, EnvironmentPhase.RUNNING);
    const other = await plane.addUser();
    const { environment } = await other.client.environments.createEnvironment({
      spec: { machine: { class: host.classId } },
    });
    const theirs = environment?.id ?? "";
    await reaches(other.client, theirs, EnvironmentPhase.RUNNING);
    const answer = await exec(
      other,
      theirs,
      `GIT_TERMINAL_PROMPT=0 git ls-remote ${repository.url} 2>&1 || echo refused`,
    );
    expect(answer).toMatch(/could not read Username.*\nrefused$/s);
    if (!isRoot) return;
    const [secret] = await filesWithToken(id);
    const path = join(host.dataDir, "environments", id, secret ?? "none");
    // In a sandbox the folders of others are not even there.
    expect(await exec(other, theirs, `cat '${path}' 2>&1 || echo refused`)).toMatch(
      /(Permission denied|No such file or directory)\nrefused$/,
    );
  });
});
