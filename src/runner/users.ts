import { constants } from "node:fs";
import { access, readFile } from "node:fs/promises";
import { userInfo } from "node:os";
import { setTimeout as delay } from "node:timers/promises";
import { runCommand } from "./commands.ts";

/** The Unix user that the processes of an environment run as. */
export interface UnixUser {
  name: string;
  uid: number;
  gid: number;
  /** Made for this environment; otherwise it is the runner's own. */
  own: boolean;
}

const DEADLINE_MS = 20_000;
const ATTEMPTS = 5;
const NAME_TAKEN = 9;
const NO_SUCH_USER = 6;
const SHELLS = ["/bin/bash", "/bin/sh"];

// One at a time: the tools lock the user database and give up when they have to wait for each other.
let queue: Promise<unknown> = Promise.resolve();
function inTurn<T>(work: () => Promise<T>): Promise<T> {
  const turn = queue.then(work, work);
  queue = turn.catch(() => undefined);
  return turn;
}

/** `berth-` and 8 hex digits from the random end of the id; a later attempt takes digits further left. */
export function userName(environmentId: string, attempt = 0): string {
  const random = environmentId.replaceAll("-", "").slice(20);
  return `berth-${random.slice(0, 8)}${attempt === 0 ? "" : `-${random.slice(8)}${attempt}`}`;
}

interface Account extends UnixUser {
  comment: string;
}

/** Reads the local user database; accounts of other sources are never the runner's. */
async function findAccount(name: string): Promise<Account | undefined> {
  const line = (await readFile("/etc/passwd", "utf8")).split("\n").find((each) => each.startsWith(`${name}:`));
  const [, , uid, gid, comment = ""] = line?.split(":") ?? [];
  return line ? { name, uid: Number(uid), gid: Number(gid), comment, own: true } : undefined;
}

const comment = (environmentId: string) => `berth environment ${environmentId}`;

async function addUser(name: string, environmentId: string, home: string): Promise<number> {
  const shell = await loginShell();
  const identity = ["--home-dir", home, "--shell", shell, "--comment", comment(environmentId)];
  const bare = ["--no-create-home", "--no-log-init", "--user-group", "-K", "SUB_UID_COUNT=0", "-K", "SUB_GID_COUNT=0"];
  const { code } = await runCommand("useradd", [...bare, ...identity, name], { timeoutMs: DEADLINE_MS });
  return code;
}

/** Shell of the environments' users: bash where there is one. */
export async function loginShell(): Promise<string> {
  for (const shell of SHELLS) {
    if (await access(shell, constants.X_OK).then(() => true, () => false)) return shell;
  }
  return "/bin/sh";
}

/**
 * The user of an environment: one of its own if the runner is root, made on demand and found again after a crash; else
 * the runner's. A name that belongs to somebody else is avoided. Throws if none can be made.
 */
export async function ensureUser(environmentId: string, home: string): Promise<UnixUser> {
  if (process.getuid?.() !== 0) {
    const { username, uid, gid } = userInfo();
    return { name: username, uid, gid, own: false };
  }
  return await inTurn(async () => {
    let taken = 0;
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      const name = userName(environmentId, taken);
      const found = await findAccount(name);
      if (found?.comment === comment(environmentId) && found.uid !== 0) {
        return { name, uid: found.uid, gid: found.gid, own: true };
      }
      if (found) {
        taken++;
        continue;
      }
      const code = await addUser(name, environmentId, home);
      const made = code === 0 ? await findAccount(name) : undefined;
      if (made) return { name, uid: made.uid, gid: made.gid, own: true };
      if (code === NAME_TAKEN) taken++;
      else await delay(200 * 2 ** attempt);
    }
    throw new Error("no Unix user could be made for the environment");
  });
}

/** Removes the user that was made for an environment; one that is gone, or belongs to somebody else, is left alone. */
export async function removeUser(environmentId: string, user: UnixUser | undefined): Promise<void> {
  if (!user?.own || process.getuid?.() !== 0) return;
  await inTurn(async () => {
    const found = await findAccount(user.name);
    if (found?.comment !== comment(environmentId)) return;
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      const { code } = await runCommand("userdel", [user.name], { timeoutMs: DEADLINE_MS });
      if (code === 0 || code === NO_SUCH_USER) return;
      await delay(200 * 2 ** attempt);
    }
    throw new Error(`user ${user.name} could not be removed`);
  });
}
