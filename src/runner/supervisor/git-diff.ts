import { lstat, readlink } from "node:fs/promises";
import { join } from "node:path";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { FileChange_ChangeType as ChangeType, type FileChange } from "../../../gen/gitpod/v1/environment_pb.js";
import {
  type GetFileDiffContentRequest,
  type GetFileDiffContentResponseSchema,
  type GetGitDiffRequest,
  type GetGitDiffResponseSchema,
  type GitHunk,
  GitHunkSchema,
  ReadFileRequestSchema,
} from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { errnoOf, invalidArgument } from "./errors.ts";
import { readFile } from "./files.ts";
import { comparedFile, diffBase, isBehindLink, PLAIN_DIFF, pathInCheckout } from "./git-changes.ts";
import { type GitOptions, gitOutput, unusable } from "./git-command.ts";

const MAX_DIFF_BYTES = 8 * 1024 * 1024;
const MAX_CONTENT_BYTES = 8 * 1024 * 1024;
const MAX_CONTEXT_LINES = 10_000_000;
/** As many bytes git looks at to tell what is binary. */
const PROBE_BYTES = 8000;

const HUNK_HEADER = /^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(.*)$/;

/**
 * Reads the hunks of a unified diff of one file. Positions are line numbers from the first hunk header on, which is 0.
 * The body ends without a newline if the new content does; where a removed line does, its end is noted in bytes.
 */
export function parseHunks(diff: string): GitHunk[] {
  const hunks: GitHunk[] = [];
  let hunk: GitHunk | undefined;
  let [position, body, offset] = [0, [] as string[], 0];
  const close = () => {
    if (hunk) hunk.body = body.join("");
    [body, offset] = [[], 0];
  };
  const lines = diff.split("\n");
  for (const line of lines.slice(0, diff.endsWith("\n") ? -1 : undefined)) {
    const [, originalStart, originalLines = "1", newStart, newLines = "1", section = ""] = HUNK_HEADER.exec(line) ?? [];
    if (originalStart !== undefined) {
      close();
      hunk = create(GitHunkSchema, {
        originalStartLine: Number(originalStart),
        originalLines: Number(originalLines),
        newStartLine: Number(newStart),
        newLines: Number(newLines),
        section: section.trim(),
        startPosition: ++position,
      });
      hunks.push(hunk);
    } else if (hunk && line.startsWith("\\")) {
      if (body.at(-1)?.startsWith("-")) hunk.originalNoNewlineAt = offset;
      else body.push(body.pop()?.slice(0, -1) ?? "");
    } else if (hunk && /^[-+ ]/.test(line)) {
      body.push(`${line}\n`);
      offset += Buffer.byteLength(line) + 1;
      position++;
    } else if (hunk) {
      close();
      hunk = undefined;
    }
  }
  close();
  return hunks;
}

const isBinaryDiff = (diff: string) => /^Binary files .* differ$/m.test(diff.split(/^@@ /m, 1)[0] ?? "");

/** The diff of one file as git prints it. */
async function unifiedDiff(options: GitOptions, base: string, change: FileChange, unified: number): Promise<string> {
  const context = `--unified=${Math.min(unified, MAX_CONTEXT_LINES)}`;
  const isUntracked = change.changeType === ChangeType.UNTRACKED;
  const paths = change.oldPath === "" ? [change.path] : [change.oldPath, change.path];
  const what = isUntracked
    ? ["--no-index", "--", "/dev/null", `./${change.path}`]
    : ["--find-renames", base, "--", ...paths];
  // Blank lines of the context keep the space they begin with.
  const args = ["-c", "diff.suppressBlankEmpty=false", "diff", context, ...PLAIN_DIFF, ...what];
  const end = await gitOutput(options, args, MAX_DIFF_BYTES, "the diff");
  if (end.code > (isUntracked ? 1 : 0)) throw unusable(end);
  return end.output.toString("utf8");
}

/** The diff of one file, working tree against HEAD or the merge base; RESOURCE_EXHAUSTED above 8 MiB. */
export async function gitDiff(
  { path, unified, baseRef }: GetGitDiffRequest,
  options: GitOptions,
): Promise<MessageInitShape<typeof GetGitDiffResponseSchema>> {
  if (unified < 0) throw invalidArgument("unified is negative");
  const below = await pathInCheckout(options.directory, path);
  const base = await diffBase(options, baseRef);
  const { change } = await comparedFile(options, base, below);
  if (!change) return {};
  const diff = await unifiedDiff(options, base, change, unified);
  return { fileChange: change, hunks: parseHunks(diff), isBinary: isBinaryDiff(diff) };
}

const tooLarge = (path: string) =>
  new ConnectError(`${path} is larger than ${MAX_CONTENT_BYTES} bytes`, Code.ResourceExhausted);

async function contentOf(options: GitOptions, object: string | undefined, path: string): Promise<Buffer> {
  if (object === undefined) return Buffer.alloc(0);
  const end = await gitOutput(options, ["cat-file", "blob", object], MAX_CONTENT_BYTES, path);
  if (end.code !== 0) throw unusable(end);
  return end.output;
}

/** Content in the working tree as git takes it: of a link, where it leads. */
async function presentContent(directory: string, path: string): Promise<Uint8Array> {
  const absolute = join(directory, path);
  const found = await lstat(absolute).catch((error) => {
    if (["ENOENT", "ENOTDIR"].includes(errnoOf(error) ?? "")) return undefined;
    throw error;
  });
  // A directory or a link may have taken the place of the file or of a directory above it.
  if (!found || found.isDirectory() || (await isBehindLink(directory, path))) return Buffer.alloc(0);
  if (found.isSymbolicLink()) return await readlink(absolute, "buffer");
  if (found.size > MAX_CONTENT_BYTES) throw tooLarge(path);
  const { result } = await readFile(create(ReadFileRequestSchema), absolute);
  const data = (result?.case === "content" ? result.value.data : undefined) ?? Buffer.alloc(0);
  if (data.length > MAX_CONTENT_BYTES) throw tooLarge(path);
  return data;
}

const looksBinary = (content: Uint8Array) => content.subarray(0, PROBE_BYTES).includes(0);

/** Both sides of one file in full; RESOURCE_EXHAUSTED when one is larger than 8 MiB. */
export async function fileDiffContent(
  { path, includeBinaryContent, baseRef }: GetFileDiffContentRequest,
  options: GitOptions,
): Promise<MessageInitShape<typeof GetFileDiffContentResponseSchema>> {
  const below = await pathInCheckout(options.directory, path);
  const base = await diffBase(options, baseRef);
  const { change, original, ...compared } = await comparedFile(options, base, below);
  const originalContent = await contentOf(options, original, below);
  const newContent = await presentContent(options.directory, below);
  const isBinary = compared.isBinary || looksBinary(originalContent) || looksBinary(newContent);
  const isShown = !isBinary || includeBinaryContent;
  return { fileChange: change, isBinary, ...(isShown && { originalContent, newContent }) };
}
