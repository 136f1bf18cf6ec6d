import { execFileSync } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { CommandTimeout, runCommand } from "../src/runner/commands.ts";
import { isAlive } from "../src/runner/supervisor/processes.ts";
import { CommandShell } from "../src/runner/supervisor/shell.ts";
import { claimUser, removeUser, UserTakenError, userName } from "../src/runner/users.ts";
import { eventually } from "./harness/wait.ts";

// What saves the runner forks, and waiting for accounts: its commands run in a shell, and its users are made meanwhile.

const PATH = process.env.PATH ?? "";

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "berth-shell-"));
});
afterAll(async () => {
  await rm(folder, { recursive: true, force: true });
});

function newShell() {
  const shell = new CommandShell({}, { PATH, ONE: "1" });
  return { shell, [Symbol.dispose]: () => shell.close() };
}

/** Runs a script in the shell, and tells whether it was run there. */
async function run(shell: CommandShell, script: string, more: Partial<Parameters<typeof runCommand>[2]> = {}) {
  return await runCommand("sh", ["-c", script], { user: { shell }, timeoutMs: 10_000, cwd: folder, ...more });
}

const pidOf = async (shell: CommandShell) => Number((await run(shell, "echo $PPID")).stdout);

describe("a shell for commands", () => {
  test("runs one after the other, each with its own folder, variables, output and end", async () => {
    using it = newShell();
    const first = await run(it.shell, 'pwd; echo "$ONE $TWO" >&2; exit 3', { env: { TWO: "a 'b'\n$c \\" } });
    expect(first).toEqual({ code: 3, stdout: `${folder}\n`, stderr: "1 a 'b'\n$c \\\n" });
    expect(await run(it.shell, 'echo "$TWO"', { cwd: "/" })).toEqual({ code: 0, stdout: "\n", stderr: "" });
    expect((await run(it.shell, "kill -TERM $$")).code).toBe(143);
    const words = ["%s|", "", "a b", "-n", "*", "$(id)", "`id`", "line\nbreak", "'\"\\", "é€"];
    const { stdout } = await runCommand("printf", words, { user: { shell: it.shell }, timeoutMs: 10_000 });
    expect(stdout).toBe(words.slice(1).join("|").concat("|"));
    expect(await pidOf(it.shell)).toBe(await pidOf(it.shell));
  });

  test("output of every shape comes whole, and as it is said", async () => {
    using it = newShell();
    for (const text of ["", "\n", "\n\n", "no newline", "\n0123", "a\n"]) {
      expect((await run(it.shell, `printf '%s' '${text}'`)).stdout).toBe(text);
    }
    const long = await run(it.shell, "head -c 3000000 /dev/zero; printf e >&2", { maxOutput: 4_000_000 });
    expect([long.stdout.length, long.stderr]).toEqual([3_000_000, "e"]);
    execFileSync("mkfifo", [join(folder, "rest")]);
    const seen = Promise.withResolvers<void>();
    const onOutput = (chunk: Buffer) => chunk.includes("begun") && seen.resolve();
    const waiting = run(it.shell, "echo begun; cat rest", { onOutput });
    await seen.promise;
    await writeFile(join(folder, "rest"), "over");
    expect((await waiting).stdout).toBe("begun\nover");
  });

  test("nothing can be read, and what cannot be said to it is run in another way", async () => {
    using it = newShell();
    expect((await run(it.shell, "cat; echo read")).stdout).toBe("read\n");
    expect((await run(it.shell, "cat", { input: "text" })).stdout).toBe("text");
    const place = { cwd: "/", env: {} };
    const nothing = () => undefined;
    expect(it.shell.start({ file: "echo", args: ["a\0b"], ...place }, nothing)).toBeUndefined();
    expect(it.shell.start({ file: "echo", args: [], cwd: "/", env: { "a;b": "" } }, nothing)).toBeUndefined();
    expect((await run(it.shell, "true", { cwd: join(folder, "missing") })).code).toBe(127);
    const missing = await runCommand("no-such-program", [], { user: { shell: it.shell }, timeoutMs: 10_000 });
    expect(missing.code).toBe(127);
  });

  test("a second command does not wait for the first", async () => {
    using it = newShell();
    const [first, second] = await Promise.all([run(it.shell, "echo $PPID"), run(it.shell, "echo $PPID")]);
    expect(Number(second.stdout)).toBe(process.pid);
    expect(Number(first.stdout)).not.toBe(process.pid);
  });

  test("a command that takes too long or is not wanted any more ends with all that it has started", async () => {
    using it = newShell();
    const leader = Promise.withResolvers<{ pid: number; startTime: number }>();
    const endless = run(it.shell, "sleep 1000 & sleep 1000", {
      timeoutMs: 100,
      onStart: async (process) => leader.resolve(process),
    });
    await expect(endless).rejects.toThrow(CommandTimeout);
    expect(isAlive(await leader.promise)).toBe(false);
    expect((await run(it.shell, "echo again")).stdout).toBe("again\n");
    const controller = new AbortController();
    const unwanted = run(it.shell, "sleep 1000", {
      signal: controller.signal,
      onStart: async () => controller.abort(),
    });
    await expect(unwanted).rejects.toThrow();
    expect((await run(it.shell, "echo again")).stdout).toBe("again\n");
  });

  test("a shell that is killed is an end of its command, and another one takes its place", async () => {
    using it = newShell();
    expect((await run(it.shell, "kill -KILL $PPID; sleep 0")).code).toBe(137);
    expect((await run(it.shell, "echo again")).stdout).toBe("again\n");
  });

  test("it ends when it is closed; what is at work then goes on", async () => {
    using it = newShell();
    const isThere = (pid: number) => {
      try {
        return process.kill(pid, 0);
      } catch {
        return false;
      }
    };
    const closed = await pidOf(it.shell);
    const last = run(it.shell, "echo $PPID");
    it.shell.close();
    expect(Number((await last).stdout)).toBe(closed);
    await eventually(() => !isThere(closed), "the end of a shell that was closed");
    expect(Number((await run(it.shell, "echo $PPID")).stdout)).toBe(process.pid);
  });
});

describe.runIf(process.getuid?.() === 0)("a user whose account is on its way", () => {
  const id = "01a00000-0000-7000-8000-" as const;
  const none: ReadonlySet<number> = new Set();
  const addUser = (...args: string[]) => execFileSync("useradd", ["--no-create-home", "--user-group", ...args]);

  test("is the same one afterwards, and no other environment's meanwhile", async () => {
    const environmentId = `${id}00000000f001`;
    try {
      const claim = await claimUser(environmentId, folder, none);
      const again = await claimUser(environmentId, folder, none, claim.user);
      expect(again.user).toEqual(claim.user);
      // Both may be under way for a moment, when one pass gives way to the next.
      expect(await Promise.all([claim.settle(), again.settle()])).toEqual([claim.user, claim.user]);
      expect(execFileSync("id", ["-u", claim.user.name]).toString().trim()).toBe(String(claim.user.uid));
      expect((await claimUser(environmentId, folder, none)).user).toEqual(claim.user);
    } finally {
      await removeUser(environmentId);
    }
  });

  test("is given up when somebody else was given the id or the name; the next claim has others", async () => {
    const environmentId = `${id}00000000f002`;
    const names = ["berth-test-taken", userName(environmentId)];
    try {
      const { user, settle } = await claimUser(environmentId, folder, none);
      addUser("--uid", String(user.uid), names[0] ?? "");
      await expect(settle()).rejects.toThrow(UserTakenError);
      const second = await claimUser(environmentId, folder, none, user);
      expect(second.user.uid).not.toBe(user.uid);
      addUser(names[1] ?? "");
      await expect(second.settle()).rejects.toThrow(UserTakenError);
      const third = await claimUser(environmentId, folder, none, second.user);
      expect(third.user).toEqual({ ...second.user, name: userName(environmentId, 1) });
      expect(await third.settle()).toEqual(third.user);
    } finally {
      for (const name of names) execFileSync("sh", ["-c", 'userdel "$0" || :', name]);
      await removeUser(environmentId);
    }
  });
});
