import { type ChildProcess, spawn } from "node:child_process";
import { chmod } from "node:fs/promises";
import { join } from "node:path";
import { type Readable, Transform } from "node:stream";
import { runCommand } from "../commands.ts";
import { writeAtomically } from "../files.ts";
import { commandUser, ownerOf } from "../machine.ts";
import { processEnd } from "../supervisor/processes.ts";
import type { Inhabitant } from "../users.ts";
import { dockerIgnore } from "./docker-ignore.ts";
import type { ImageSource } from "./plan.ts";

// The context of a build is read by commands that run as the environment's user and handed to the engine as an archive:
// whatever a repository links to, no more gets into an image than that user can read itself.

const READ_MS = 30_000;
const LIST_MS = 120_000;
const MAX_DOCKERFILE_BYTES = 1024 * 1024;
const MAX_LIST_BYTES = 64 * 1024 * 1024;
const MAX_CONTEXT_BYTES = 8 * 1024 ** 3;
const MAX_COMPLAINTS = 2000;
const CHANGED = 1;
const DOCKERFILE = ".berth-dockerfile";
const PROBLEMS = ["", "", "", "", "the context does not exist", "the Dockerfile does not exist"];
// Arguments: checkout, context, Dockerfile, most bytes of it. Prints the context's real path, and the Dockerfile.
const RESOLVE = `cd -- "$1" || exit 4
top=$(pwd -P)
context=$(realpath -- "$2") && [ -d "$context" ] || exit 4
case "$context/" in "\${top%/}"/*) ;; *) exit 6 ;; esac
file=$(realpath -- "$3") && [ -f "$file" ] || exit 5
case "$file" in "\${top%/}"/*) ;; *) exit 7 ;; esac
printf '%s\\n' "$context"
exec head -c "$4" -- "$file"`;

/** A context on its way to an engine. */
export interface BuildContext {
  archive: Readable;
  /** Path of the Dockerfile in it. */
  dockerfile: string;
  /** Resolves when all of it has been read; rejects with a text for people if it could not be. */
  complete: Promise<void>;
  /** Ends reading. */
  cancel(): void;
}

/** Whose checkout it is, and a folder of the runner's that this user can read. */
export interface ContextPlace {
  folder: string;
  user: Inhabitant;
  shared: string;
}

async function resolved({ folder, user }: ContextPlace, source: ImageSource & { kind: "build" }) {
  const args = ["-c", RESOLVE, "sh", folder, source.context, source.dockerfile, String(MAX_DOCKERFILE_BYTES + 1)];
  const { code, stdout } = await runCommand("sh", args, {
    ...{ user: commandUser(user), timeoutMs: READ_MS, maxOutput: 2 * MAX_DOCKERFILE_BYTES },
  });
  if (code !== 0) throw new Error(PROBLEMS[code] || "the Dockerfile and its context have to lie in the checkout");
  const end = stdout.indexOf("\n");
  const text = stdout.slice(end + 1);
  if (Buffer.byteLength(text) > MAX_DOCKERFILE_BYTES) throw new Error("the Dockerfile is larger than 1 MiB");
  return { context: stdout.slice(0, end), text };
}

/** Names of what belongs to the context, each ended by NUL; undefined if that is everything. */
async function chosen(context: string, user: Inhabitant): Promise<string | undefined> {
  const options = { user: commandUser(user), cwd: context, timeoutMs: LIST_MS };
  const { stdout: rules } = await runCommand("head", ["-c", String(MAX_DOCKERFILE_BYTES), "--", ".dockerignore"], {
    ...{ ...options, maxOutput: MAX_DOCKERFILE_BYTES },
  });
  const isLeftOut = dockerIgnore(rules);
  if (!isLeftOut) return undefined;
  const list = await runCommand("find", [".", "-mindepth", "1", "-print0"], { ...options, maxOutput: MAX_LIST_BYTES });
  if (Buffer.byteLength(list.stdout) >= MAX_LIST_BYTES) throw new Error("the context has too many files");
  const names = list.stdout.split("\0").filter((name) => name !== "" && !isLeftOut(name.slice(2)));
  return names.map((name) => `${name}\0`).join("");
}

/** Opens the context of a build. Throws with a text for people if there is none. */
export async function openContext(place: ContextPlace, source: ImageSource & { kind: "build" }): Promise<BuildContext> {
  const { context, text } = await resolved(place, source);
  const names = await chosen(context, place.user);
  const dockerfile = join(place.shared, DOCKERFILE);
  await writeAtomically(dockerfile, text);
  await chmod(dockerfile, 0o644);
  const what = names === undefined ? ["."] : ["--no-recursion", "--null", "--verbatim-files-from", "--files-from=-"];
  const tar = spawn(
    "tar",
    [
      ...["--create", "--file=-", "--owner=0", "--group=0", "--numeric-owner", "--ignore-failed-read"],
      ...["--directory", context, ...what, "--directory", place.shared, DOCKERFILE],
    ],
    {
      cwd: "/",
      env: { PATH: "/usr/bin:/bin", LC_ALL: "C.UTF-8" },
      stdio: ["pipe", "pipe", "pipe"],
      ...ownerOf(place.user),
    },
  );
  tar.stdin.on("error", () => undefined);
  tar.stdin.end(names ?? "");
  const archive = tar.stdout.pipe(bounded());
  archive.on("error", () => tar.kill("SIGKILL"));
  return { archive, dockerfile: DOCKERFILE, complete: completion(tar), cancel: () => void tar.kill("SIGKILL") };
}

/** Fails on more than an engine should be given. */
function bounded(): Transform {
  let size = 0;
  return new Transform({
    transform(chunk: Buffer, _encoding, done) {
      size += chunk.length;
      if (size > MAX_CONTEXT_BYTES) done(new Error("the context is larger than 8 GiB"));
      else done(null, chunk);
    },
  });
}

async function completion(tar: ChildProcess): Promise<void> {
  let complaints = "";
  tar.stderr?.setEncoding("utf8").on("data", (text: string) => {
    complaints = (complaints + text).slice(0, MAX_COMPLAINTS);
  });
  const { code } = await processEnd(tar);
  // A file that somebody writes to is taken as it is.
  if (code === 0 || code === CHANGED) return;
  throw new Error(`the context of the build could not be read: ${complaints.split("\n")[0] || "tar was ended"}`);
}
