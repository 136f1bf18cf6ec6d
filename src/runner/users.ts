import { randomInt } from "node:crypto";
import { readFileSync } from "node:fs";
import { userInfo } from "node:os";
import { setTimeout as delay } from "node:timers/promises";
import { runCommand } from "./commands.ts";
import type { Namespaces } from "./supervisor/namespaces.ts";
import { isProgram } from "./supervisor/programs.ts";
import type { Shell } from "./supervisor/started-command.ts";

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
  /** Runs its short commands. */
  shell?: Shell | undefined;
}

// High enough to keep out of people's way, low enough for user namespaces.
const FIRST_UID = 50_000;
const LAST_UID = 59_999;
const UIDS = LAST_UID - FIRST_UID + 1;
const SHARED_FOLDERS = ["/tmp", "/var/tmp", "/dev/shm"];
const DEADLINE_MS = 20_000;
const ATTEMPTS = 4;
const HEAD_START_MS = 10;
const RETRY_MS = 200;
const UID_TAKEN = 4;
const NAME_TAKEN = 9;
const NO_SUCH_USER = 6;
// Services that run as users made for them alone get ids above 60,000.
const LOCAL_SOURCES: ReadonlySet<string> = new Set(["files", "systemd"]);
const SHELLS = ["/bin/bash", "/bin/sh"];

// Ids that were given out without an account, for now or for good, by environment: nothing else shows that they are taken.
const claimed = new Map<string, number>();

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
export const loginShell = (): string => SHELLS.find(isProgram) ?? "/bin/sh";

interface Account {
  name: string;
  uid: number;
  gid: number;
  comment: string;
  home: string;
}

/** A small local file of the system; empty if it cannot be read. */
function systemFile(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return "";
  }
}

/** The local user database; accounts of other sources are never the runner's. */
function accounts(): Account[] {
  return systemFile("/etc/passwd")
    .split("\n")
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
  const identity = ["--home-dir", home, "--shell", loginShell(), "--comment", commentOf(environmentId)];
  const bare = ["--no-create-home", "--no-log-init", "--user-group", "-K", "SUB_UID_COUNT=0", "-K", "SUB_GID_COUNT=0"];
  const args = [...bare, ...identity, "--uid", String(uid), name];
  return await runCommand("useradd", args, { timeoutMs: DEADLINE_MS }).then(
    ({ code }) => code,
    () => undefined,
  );
}

/** The system asks nobody but the local database, and those that know no ids of the range, for users. */
function hasLocalUsersOnly(): boolean {
  const sources = /^\s*passwd:([^#\n]*)/m.exec(systemFile("/etc/nsswitch.conf"))?.[1]?.trim().split(/\s+/);
  return sources?.every((source) => LOCAL_SOURCES.has(source)) ?? false;
}

/** A user of another source than the local database has the id, such as one of a directory service. */
async function isKnownElsewhere(uid: number): Promise<boolean> {
  if (hasLocalUsersOnly()) return false;
  const { code } = await runCommand("getent", ["passwd", String(uid)], { timeoutMs: DEADLINE_MS }).catch(() => ({
    code: 2,
  }));
  return code === 0;
}

/** Claims an id for an environment. */
async function claimId(environmentId: string, present: readonly Account[], reserved: ReadonlySet<number>) {
  const taken = new Set([...present.flatMap(({ uid, gid }) => [uid, gid]), ...reserved]);
  const isClaimed = (uid: number) => [...claimed.values()].includes(uid);
  // Anywhere in the range: what a former holder has left somewhere should not soon belong to a new environment.
  const start = randomInt(UIDS);
  for (let step = 0; step < UIDS; step++) {
    const uid = FIRST_UID + ((start + step) % UIDS);
    if (taken.has(uid) || isClaimed(uid) || (await isKnownElsewhere(uid)) || isClaimed(uid)) continue;
    claimed.set(environmentId, uid);
    return uid;
  }
  throw new Error(`no user id from ${FIRST_UID} to ${LAST_UID} is free`);
}

/** The user an environment is to have. */
export interface UserClaim {
  /** Its files and processes may be that user's from now on: the id is nobody else's as far as is known. */
  user: UnixUser;
  /**
   * Makes it known to the system; resolves once it is, or cannot be. UserTakenError if somebody else was given the id or
   * the name.
   */
  settle(): Promise<UnixUser>;
}

/** Somebody else was given the id or the name at the same time; a claim made anew has others. */
export class UserTakenError extends Error {}

/**
 * The user of an environment: one of its own if the runner is root, made on demand and found again after a crash; else
 * the runner's. `before` is the user its files belong to, whose id is kept if nobody has it by now; `reserved` are ids
 * of other environments, whose accounts may be missing. Where no account can be made, the id alone has to do.
 */
export async function claimUser(
  environmentId: string,
  home: string,
  reserved: ReadonlySet<number>,
  before?: UnixUser,
): Promise<UserClaim> {
  if (process.getuid?.() !== 0) {
    const { username, uid, gid } = userInfo();
    return settledClaim({ name: username, uid, gid, own: false });
  }
  const present = accounts();
  const found = present.find(isOurs(environmentId));
  if (found) return settledClaim({ name: found.name, uid: found.uid, gid: found.gid, own: true });
  const others = new Set([...claimed].flatMap(([id, uid]) => (id === environmentId ? [] : uid)));
  const isFree = before?.own && ![reserved, others].some((ids) => ids.has(before.uid)) && !hasId(present, before.uid);
  claimed.delete(environmentId);
  if (isFree) claimed.set(environmentId, before.uid);
  const uid = isFree ? before.uid : await claimId(environmentId, present, reserved);
  let nameAttempt = 0;
  while (present.some(({ name }) => name === userName(environmentId, nameAttempt))) nameAttempt++;
  const user = { name: userName(environmentId, nameAttempt), uid, gid: uid, own: true };
  return {
    user: isFree && before.unlisted ? { ...user, unlisted: true } : user,
    // Starting a process holds up this one, and those who wait for the account have more to wait for.
    settle: () => delay(HEAD_START_MS).then(() => inTurn(() => makeAccount(user, environmentId, home))),
  };
}

const settledClaim = (user: UnixUser): UserClaim => ({ user, settle: () => Promise.resolve(user) });
const hasId = (present: readonly Account[], id: number) => present.some(({ uid, gid }) => uid === id || gid === id);

async function makeAccount(user: UnixUser, environmentId: string, home: string): Promise<UnixUser> {
  for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
    const isThere = accounts().some((account) => isOurs(environmentId)(account) && account.uid === user.uid);
    const code = isThere ? 0 : await addUser(user.name, user.uid, environmentId, home);
    if (code === undefined) break;
    if (code === 0) {
      claimed.delete(environmentId);
      return user;
    }
    if (code === NAME_TAKEN || code === UID_TAKEN) {
      claimed.delete(environmentId);
      throw new UserTakenError(`the user ${user.name} (${user.uid}) is somebody else by now`);
    }
    await delay(RETRY_MS * 2 ** attempt);
  }
  return { ...user, unlisted: true };
}

/**
 * The id by which processes of an environment can be told from all others: undefined if it runs as the runner's user,
 * or if somebody else has got the id since.
 */
export async function distinctUid(environmentId: string, user: UnixUser | undefined): Promise<number | undefined> {
  if (!user?.own || process.getuid?.() !== 0) return undefined;
  const holder = accounts().find(({ uid }) => uid === user.uid);
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
  claimed.delete(environmentId);
  if (user?.own === false || process.getuid?.() !== 0) return;
  const uid = accounts().find(isOurs(environmentId))?.uid ?? (await distinctUid(environmentId, user));
  if (uid !== undefined && ![...claimed.values()].includes(uid)) await removeLeftovers(uid);
  await inTurn(async () => {
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      const found = accounts().find(isOurs(environmentId));
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
  return accounts()
    .filter(({ home }) => home.startsWith(`${folder}/`))
    .map(({ comment }) => comment.slice(commentOf("").length))
    .filter((id) => id !== "");
}
