import { lstat, realpath } from "node:fs/promises";
import { dirname, isAbsolute, join, relative } from "node:path";
import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import {
  FileChange_ChangeType as ChangeType,
  type FileChange,
  FileChangeSchema,
} from "../../../gen/gitpod/v1/environment_pb.js";
import { failedPrecondition, invalidArgument } from "./errors.ts";
import { resolvePath } from "./files.ts";
import { type GitOptions, gitItems, gitOrFail, gitOutput, unusable } from "./git-command.ts";
import { uncommittedChanges } from "./git-status.ts";

// Whatever the user's or the repository's configuration says, a diff has one form and starts no program.
export const PLAIN_DIFF = [
  ...["--no-ext-diff", "--no-textconv", "--no-color", "--no-relative", "--submodule=short"],
  ...["--inter-hunk-context=0", "--src-prefix=a/", "--dst-prefix=b/"],
];
const MAX_LISTED = 10_000;
const MAX_REF_CHARACTERS = 1024;
const MAX_LINE_BYTES = 4096;
const OBJECT_ID = /^[0-9a-f]{40,64}$/;
const ELSEWHERE = "path is not a file of the repository";
const GITLINK = "160000";
const TREE = "040000";

const notFound = (message: string) => new ConnectError(message, Code.NotFound);

/** One line that git prints; undefined if it ends with code 1, its way to say that there is none. */
async function line(options: GitOptions, args: readonly string[]): Promise<string | undefined> {
  const end = await gitOutput(options, args, MAX_LINE_BYTES, "a line");
  if (end.code > 1) throw unusable(end);
  return end.code === 0 ? end.output.toString("utf8").trim() : undefined;
}

/**
 * What the working tree is compared with: HEAD, or the merge base of a ref and HEAD. Without a commit that is the
 * empty tree. INVALID_ARGUMENT for what can be no ref, NOT_FOUND for an unknown one.
 */
export async function diffBase(options: GitOptions, ref: string): Promise<string> {
  if (ref.startsWith("-") || ref.includes("\0") || ref.length > MAX_REF_CHARACTERS) {
    throw invalidArgument("base_ref is not a ref");
  }
  const head = await line(options, ["rev-parse", "--verify", "--quiet", "HEAD^{commit}"]);
  if (ref === "") return head ?? (await line(options, ["hash-object", "-t", "tree", "--stdin"])) ?? "";
  const commit = await commitOf(options, ref);
  if (!head) throw failedPrecondition("there is no commit yet to compare with base_ref");
  const base = await line(options, ["merge-base", commit, head]);
  if (!base) throw failedPrecondition("base_ref and HEAD have no commit in common");
  return base;
}

async function commitOf(options: GitOptions, ref: string): Promise<string> {
  const args = ["rev-parse", "--verify", "--quiet", `${ref}^{commit}`];
  const { code, output } = await gitOutput(options, args, MAX_LINE_BYTES, "a line");
  const commit = output.toString("utf8").trim();
  if (code !== 0 || !OBJECT_ID.test(commit)) throw notFound("base_ref names no commit");
  return commit;
}

/** Path of a request below the checkout, as git writes it; INVALID_ARGUMENT if it lies elsewhere. */
export async function pathInCheckout(directory: string, path: string): Promise<string> {
  const absolute = resolvePath(directory, path);
  for (const root of [directory, await realpath(directory).catch(() => directory)]) {
    const below = relative(root, absolute);
    const [first] = below.split("/", 1);
    if (below !== "" && first !== ".." && first !== ".git" && !isAbsolute(below)) return below;
  }
  throw invalidArgument(ELSEWHERE);
}

/** Whether a link leads out of the tree on the way to a path. */
export async function isBehindLink(directory: string, path: string): Promise<boolean> {
  const parent = await realpath(dirname(join(directory, path))).catch(() => undefined);
  return parent !== undefined && parent !== dirname(join(await realpath(directory), path));
}

/** Whether what is found at a path is not of this repository, but behind a link or in a repository within. */
async function isForeign(directory: string, path: string): Promise<boolean> {
  for (let parent = dirname(path); parent !== "."; parent = dirname(parent)) {
    const inner = await lstat(join(directory, parent, ".git")).catch(() => undefined);
    if (inner) return true;
  }
  return await isBehindLink(directory, path);
}

/** An entry of `git diff --raw`. */
interface RawChange {
  /** `A`, `C`, `D`, `M`, `R`, `T` or `U`. */
  letter: string;
  path: string;
  /** Of a rename or copy. */
  oldPath: string;
  /** Mode and object before; zeros for none. */
  oldMode: string;
  oldObject: string;
}

const TYPES: Readonly<Record<string, ChangeType>> = {
  A: ChangeType.ADDED,
  C: ChangeType.COPIED,
  D: ChangeType.DELETED,
  R: ChangeType.RENAMED,
  U: ChangeType.UPDATED_BUT_UNMERGED,
};

const fileChange = ({ letter, path, oldPath }: RawChange): FileChange =>
  create(FileChangeSchema, { path, oldPath, changeType: TYPES[letter] ?? ChangeType.MODIFIED });

const untrackedChange = (path: string): FileChange =>
  create(FileChangeSchema, { path, changeType: ChangeType.UNTRACKED });

/** Reads `git diff --raw --no-abbrev -z` item by item; items of other formats go to `onOther`. */
function rawReader(onChange: (change: RawChange) => void, onOther: (item: string) => void = () => undefined) {
  let open: { change: RawChange; paths: number } | undefined;
  return (item: string): void => {
    if (!open) {
      const [, oldMode = "", oldObject = "", status = ""] =
        /^:(\d{6}) \d{6} ([0-9a-f]+) [0-9a-f]+ ([A-Z]\d*)$/.exec(item) ?? [];
      const letter = status.slice(0, 1);
      const change = { letter, path: "", oldPath: "", oldMode, oldObject };
      if (letter === "") onOther(item);
      else open = { change, paths: letter === "R" || letter === "C" ? 2 : 1 };
      return;
    }
    if (open.paths === 2) open.change.oldPath = item;
    open.change.path = item;
    if (--open.paths > 0) return;
    onChange(open.change);
    open = undefined;
  };
}

/** Files that git does not know and is not told to ignore. */
const UNTRACKED = ["ls-files", "--others", "--exclude-standard", "-z"];

/** Changed files: what is not committed, or everything since the merge base of a ref and HEAD. */
export async function changedFiles(
  options: GitOptions,
  ref: string,
): Promise<{ changes: FileChange[]; total: number }> {
  if (ref === "") return await uncommittedChanges(options, MAX_LISTED);
  const base = await diffBase(options, ref);
  const changes: FileChange[] = [];
  let total = 0;
  const add = (change: FileChange) => {
    // A file in conflict is named once more as what it has become.
    const before = changes.at(-1);
    if (before?.path === change.path && before.changeType === ChangeType.UPDATED_BUT_UNMERGED) return;
    if (++total <= MAX_LISTED) changes.push(change);
  };
  const read = rawReader((change) => add(fileChange(change)));
  await gitOrFail(options, ["diff", "--raw", "--no-abbrev", "-z", "--find-renames", ...PLAIN_DIFF, base, "--"], read);
  await gitOrFail(options, UNTRACKED, (path) => add(untrackedChange(path)));
  return { changes, total };
}

/** One file in comparison with the base. */
export interface ComparedFile {
  /** Undefined if it did not change, or is ignored. */
  change: FileChange | undefined;
  /** Git does not show its lines. */
  isBinary: boolean;
  /** Object of its content in the base; undefined if it is not there. */
  original: string | undefined;
}

/**
 * Compares one file with the base. NOT_FOUND if it is in neither, FAILED_PRECONDITION for a directory,
 * INVALID_ARGUMENT for what lies in a submodule or behind a link.
 */
export async function comparedFile(options: GitOptions, base: string, path: string): Promise<ComparedFile> {
  let raw: RawChange | undefined;
  let isBinary = false;
  const read = rawReader(
    (change) => {
      // A file in conflict comes first without, then with what it was.
      if (change.path === path) raw = raw?.letter === "U" ? { ...change, letter: "U" } : (raw ?? change);
    },
    (item) => {
      isBinary ||= item === `-\t-\t${path}`;
    },
  );
  const formats = ["--raw", "--numstat", "--no-abbrev", "-z", "--no-renames"];
  await onPath(options, ["diff", ...formats, ...PLAIN_DIFF, base, "--", path], read);
  if (raw?.letter === "A") raw = (await renamed(options, base, path)) ?? raw;
  if (raw) {
    const original = /^0+$/.test(raw.oldMode) ? undefined : raw.oldObject;
    if (raw.oldMode === GITLINK) throw failedPrecondition(`${path} is a submodule`);
    return { change: fileChange(raw), isBinary, original };
  }
  let isUntracked = false;
  await onPath(options, [...UNTRACKED, "--", path], (each) => {
    isUntracked ||= each === path;
  });
  if (isUntracked) return { change: untrackedChange(path), isBinary: false, original: undefined };
  return { change: undefined, isBinary: false, original: await unchanged(options, base, path) };
}

/** Git that fails because of the path it was given. */
async function onPath(options: GitOptions, args: readonly string[], onItem: (item: string) => void): Promise<void> {
  const end = await gitItems(options, args, onItem);
  if (/is beyond a symbolic link|is in submodule/.test(end.stderr)) {
    throw invalidArgument(ELSEWHERE);
  }
  if (end.code !== 0) throw unusable(end);
}

/** The rename that a new file is the result of. */
async function renamed(options: GitOptions, base: string, path: string): Promise<RawChange | undefined> {
  let found: RawChange | undefined;
  const read = rawReader((change) => {
    if (change.path === path) found ??= change;
  });
  const formats = ["--raw", "--no-abbrev", "-z", "--find-renames", "--diff-filter=R"];
  await gitOrFail(options, ["diff", ...formats, ...PLAIN_DIFF, base, "--"], read);
  return found;
}

/** Object of a file that did not change; undefined for an ignored one. */
async function unchanged(options: GitOptions, base: string, path: string): Promise<string | undefined> {
  let mode = "";
  let object = "";
  await onPath(options, ["ls-tree", "-z", "--full-tree", base, "--", path], (item) => {
    const [, entryMode = "", entryObject = "", entryPath = ""] = /^(\d{6}) \w+ ([0-9a-f]+)\t(.*)$/s.exec(item) ?? [];
    if (entryPath === path) [mode, object] = [entryMode, entryObject];
  });
  const present = await lstat(join(options.directory, path)).catch(() => undefined);
  if (mode === GITLINK) throw failedPrecondition(`${path} is a submodule`);
  if (present && (await isForeign(options.directory, path))) throw invalidArgument(ELSEWHERE);
  if (mode === TREE || present?.isDirectory()) throw failedPrecondition(`${path} is a directory`);
  if (object !== "") return object;
  if (!present) throw notFound(`${path} does not exist`);
  return undefined;
}
