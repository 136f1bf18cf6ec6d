import { randomInt } from "node:crypto";
import { constants } from "node:fs";
import { access, readFile } from "node:fs/promises";
import { userInfo } from "node:os";
import { setTimeout as delay } from "node:timers/promises";
import { runCommand } from "./commands.ts";
import type { Namespaces } from "./supervisor/namespaces.ts";

/** The Unix user that the processes of an environment run as. */
export interface UnixUser {
  name: string;
  uid: number;
  gid: number;
  /** Only this environment's; otherwise it is the runner's own. */
  own: boolean;
  /** The system knows it by number only. */
  unlisted?: boolean;
}

/** The user, and what else its processes run in. */
export interface Inhabitant extends UnixUser {
  inside?: Namespaces | undefined;
}

// High enough to keep out of people's way, low enough for user namespaces.
const FIRST_UID = 50_000;
const LAST_UID = 59_999;
const UIDS = LAST_UID - FIRST_UID + 1;
const SHARED_FOLDERS = ["/tmp", "/var/tmp", "/dev/shm"];
const DEADLINE_MS = 20_000;
const ATTEMPTS = 4;
const RETRY_MS = 200;
const UID_TAKEN = 4;
const NAME_TAKEN = 9;
const NO_SUCH_USER = 6;
// Services that run as users made for them alone get ids above 60,000.
const LOCAL_SOURCES: ReadonlySet<string> = new Set(["files", "systemd"]);
const SHELLS = ["/bin/bash", "/bin/sh"];

// Ids that were given out without an account, by environment: nothing else shows that they are taken.
const unlisted = new Map<string, number>();

// One at a time: the tools lock the user database and give up when they have to wait for each other.
let queue: Promise<unknown> = Promise.resolve();
function inTurn<T>(work: () => Promise<T>): Promise<T> {
  const turn = queue.then(work, work);
  queue = turn.catch(() => undefined);
  return turn;
}

/** `berth-` and 8 hex digits from the random end of the id; where that is taken, more of it and a number. */
export function userName(environmentId: string, attempt = 0): string {
  const random = environmentId.replaceAll("-", "").slice(20);
  return `berth-${random.slice(0, 8)}${attempt === 0 ? "" : `-${random.slice(8)}${attempt}`}`;
}

/** Shell of the environments' users: bash where there is one. */
export async function loginShell(): Promise<string> {
  for (const shell of SHELLS) {
    const isUsable = await access(shell, constants.X_OK).then(
      () => true,
      () => false,
    );
    if (isUsable) return shell;
  }
  return "/bin/sh";
}

interface Account {
  name: string;
  uid: number;
  gid: number;
  comment: string;
  home: string;
}

/** The local user database; accounts of other sources are never the runner's. */
async function accounts(): Promise<Account[]> {
  const lines = (await readFile("/etc/passwd", "utf8").catch(() => "")).split("\n");
  return lines
    .map((line) => line.split(":"))
    .filter((fields) => fields.length >= 7)
    .map(([name = "", , uid, gid, comment = "", home = ""]) => {
      return { name, uid: Number(uid), gid: Number(gid), comment, home };
    });
}

const commentOf = (environmentId: string) => `berth environment ${environmentId}`;

const isOurs = (environmentId: string) => (account: Account) =>
  account.comment === commentOf(environmentId) && account.uid !== 0;

/** Exit code of useradd; undefined if it cannot be started. */
async function addUser(name: string, uid: number, environmentId: string, home: string): Promise<number | undefined> {
  const identity = ["--home-dir", home, "--shell", await loginShell(), "--comment", commentOf(environmentId)];
  const bare = ["--no-create-home", "--no-log-init", "--user-group", "-K", "SUB_UID_COUNT=0", "-K", "SUB_GID_COUNT=0"];
  const args = [...bare, ...identity, "--uid", String(uid), name];
  return await runCommand("useradd", args, { timeoutMs: DEADLINE_MS }).then(
    ({ code }) => code,
    () => undefined,
  );
}

/** The system asks nobody but the local database, and those that know no ids of the range, for users. */
async function hasLocalUsersOnly(): Promise<boolean> {
  const text = await readFile("/etc/nsswitch.conf", "utf8").catch(() => "");
  const sources = /^\s*passwd:([^#\n]*)/m.exec(text)?.[1]?.trim().split(/\s+/);
  return sources?.every((source) => LOCAL_SOURCES.has(source)) ?? false;
}

/** A user of another source than the local database has the id, such as one of a directory service. */
async function isKnownElsewhere(uid: number): Promise<boolean> {
  if (await hasLocalUsersOnly()) return false;
  const { code } = await runCommand("getent", ["passwd", String(uid)], { timeoutMs: DEADLINE_MS }).catch(() => ({
    code: 2,
  }));
  return code === 0;
}

async function freeUid(present: readonly Account[], reserved: ReadonlySet<number>): Promise<number> {
  const listed = present.flatMap(({ uid, gid }) => [uid, gid]);
  const taken = new Set([...listed, ...reserved, ...unlisted.values()]);
  // Anywhere in the range: what a former holder has left somewhere should not soon belong to a new environment.
  const start = randomInt(UIDS);
  for (let step = 0; step < UIDS; step++) {
    const uid = FIRST_UID + ((start + step) % UIDS);
    if (!taken.has(uid) && !(await isKnownElsewhere(uid))) return uid;
  }
  throw new Error(`no user id from ${FIRST_UID} to ${LAST_UID} is free`);
}

/**
 * The user of an environment: one of its own if the runner is root, made on demand and found again after a crash; else
 * the runner's. `before` is the user its files belong to, whose id is kept if nobody has it by now; `reserved` are ids
 * of other environments, whose accounts may be missing. Where no account can be made, the id alone has to do.
 */
export async function ensureUser(
  environmentId: string,
  home: string,
  reserved: ReadonlySet<number>,
  before?: UnixUser,
): Promise<UnixUser> {
  if (process.getuid?.() !== 0) {
    const { username, uid, gid } = userInfo();
    return { name: username, uid, gid, own: false };
  }
  return await inTurn(async () => {
    let nameAttempt = 0;
    for (let attempt = 0; ; attempt++) {
      const present = await accounts();
      const found = present.find(isOurs(environmentId));
      if (found) return { name: found.name, uid: found.uid, gid: found.gid, own: true };
      const isFree = before?.own && !reserved.has(before.uid) && !present.some(({ uid }) => uid === before.uid);
      const uid = isFree ? before.uid : await freeUid(present, reserved);
      while (present.some(({ name }) => name === userName(environmentId, nameAttempt))) nameAttempt++;
      const name = userName(environmentId, nameAttempt);
      const code = attempt < ATTEMPTS ? await addUser(name, uid, environmentId, home) : undefined;
      if (code === undefined) {
        unlisted.set(environmentId, uid);
        return { name, uid, gid: uid, own: true, unlisted: true };
      }
      if (code !== 0 && code !== NAME_TAKEN && code !== UID_TAKEN) await delay(RETRY_MS * 2 ** attempt);
    }
  });
}

/**
 * The id by which processes of an environment can be told from all others: undefined if it runs as the runner's user,
 * or if somebody else has got the id since.
 */
export async function distinctUid(environmentId: string, user: UnixUser | undefined): Promise<number | undefined> {
  if (!user?.own || process.getuid?.() !== 0) return undefined;
  const holder = (await accounts()).find(({ uid }) => uid === user.uid);
  return holder && !isOurs(environmentId)(holder) ? undefined : user.uid;
}

/** Removes what a user has left where everybody may write: it would belong to the next environment with the id. */
async function removeLeftovers(uid: number): Promise<void> {
  const args = ["-P", ...SHARED_FOLDERS, "-xdev", "-uid", String(uid), "-delete"];
  await runCommand("find", args, { timeoutMs: DEADLINE_MS, maxOutput: 0 }).catch(() => undefined);
}

/**
 * Removes the account that was made for an environment, and what it has left behind; one that belongs to somebody else
 * is left alone.
 */
export async function removeUser(environmentId: string, user?: UnixUser): Promise<void> {
  unlisted.delete(environmentId);
  if (user?.own === false || process.getuid?.() !== 0) return;
  const uid = (await accounts()).find(isOurs(environmentId))?.uid ?? (await distinctUid(environmentId, user));
  if (uid !== undefined && ![...unlisted.values()].includes(uid)) await removeLeftovers(uid);
  await inTurn(async () => {
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      const found = (await accounts()).find(isOurs(environmentId));
      if (!found) return;
      const { code } = await runCommand("userdel", [found.name], { timeoutMs: DEADLINE_MS });
      if (code === 0 || code === NO_SUCH_USER) return;
      await delay(RETRY_MS * 2 ** attempt);
    }
    throw new Error(`the user of environment ${environmentId} could not be removed`);
  });
}

/** Ids of environments that have an account with its home below a folder. */
export async function usersBelow(folder: string): Promise<string[]> {
  return (await accounts())
    .filter(({ home }) => home.startsWith(`${folder}/`))
    .map(({ comment }) => comment.slice(commentOf("").length))
    .filter((id) => id !== "");
}
