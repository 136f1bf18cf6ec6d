import type { ConnectRouter } from "@connectrpc/connect";
import { EnvironmentOpsService } from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { type MethodName, withPending } from "../../pending.ts";
import type { ActivityTracker } from "./activity.ts";
import { opsErrors, withDeadline } from "./errors.ts";
import type { Execs } from "./exec.ts";
import { MAX_FILE_BYTES, readFile, resolvePath, writeFile } from "./files.ts";
import { find } from "./find.ts";
import { gate } from "./gate.ts";
import { defaultBranch } from "./git-branch.ts";
import { changedFiles } from "./git-changes.ts";
import type { GitOptions } from "./git-command.ts";
import { fileDiffContent, gitDiff } from "./git-diff.ts";
import { gitStatus } from "./git-status.ts";

/** Largest request message: a file at its limit plus the other fields. */
export const MAX_REQUEST_BYTES = MAX_FILE_BYTES + 1024 * 1024;
/** Largest answer: two output streams of 8 MiB in which every byte became a three-byte replacement character. */
export const MAX_RESPONSE_BYTES = 64 * 1024 * 1024;
const DEADLINE_MS = 60_000;

/** What the RPCs of one environment work with. */
export interface OpsDeps {
  workspaceFolder(): string;
  /** Variables for processes, read anew at each call. */
  environment(): Record<string, string>;
  execs: Execs;
  activity: ActivityTracker;
  /** Errors nobody foresaw; the caller only sees INTERNAL. */
  unforeseen(error: unknown): void;
}

const pending = [
  "createTerminal",
  "readTerminal",
  "writeTerminal",
  "resizeTerminal",
  "closeTerminal",
  "listTerminals",
  "attachTerminal",
  "watch",
  "listTerminalProfiles",
] as const satisfies readonly MethodName<typeof EnvironmentOpsService>[];

/** Serves EnvironmentOpsService with the rights of the process it runs in. */
export function createOpsRoutes(deps: OpsDeps): (router: ConnectRouter) => void {
  const { execs, activity } = deps;
  const heavy = gate(4, 64);
  const inTime = <T>(what: string, work: Promise<T>) => withDeadline(work, DEADLINE_MS, what);
  const heavyInTime = <T>(what: string, work: () => Promise<T>) => inTime(what, heavy(work));
  const withGit = <T>(what: string, work: (options: GitOptions) => Promise<T>) =>
    heavyInTime(what, () => work({ directory: deps.workspaceFolder(), env: deps.environment() }));
  const absolute = (path: string) => resolvePath(deps.workspaceFolder(), path);
  const service = withPending(EnvironmentOpsService, pending, {
    async exec(request) {
      const directory = request.workingDirectory === "" ? deps.workspaceFolder() : absolute(request.workingDirectory);
      return await activity.during("Ops API", execs.exec(request, directory));
    },
    cancelExec({ operationId }) {
      activity.onActivity("Ops API");
      execs.cancel(operationId);
      return {};
    },
    async readFile(request) {
      return await inTime("ReadFile", readFile(request, absolute(request.path)));
    },
    async writeFile(request) {
      activity.onActivity("Ops API");
      await inTime("WriteFile", writeFile(request, absolute(request.path)));
      return { bytesWritten: BigInt(request.content.length) };
    },
    async find(request) {
      const start = absolute(request.path);
      return await heavyInTime("Find", () => find(request, start));
    },
    async getGitStatus() {
      return { status: await withGit("GetGitStatus", gitStatus) };
    },
    async getGitDiff(request) {
      return await withGit("GetGitDiff", (options) => gitDiff(request, options));
    },
    async getGitDiffFiles({ baseRef }) {
      const { changes, total } = await withGit("GetGitDiffFiles", (options) => changedFiles(options, baseRef));
      return { changedFiles: changes, totalChangedFiles: total };
    },
    async getFileDiffContent(request) {
      return await withGit("GetFileDiffContent", (options) => fileDiffContent(request, options));
    },
    async getDefaultBranch() {
      return { branch: await withGit("GetDefaultBranch", defaultBranch) };
    },
    // WATCH would announce an RPC that is pending.
    listCapabilities: () => ({ capabilities: [] }),
  });
  const options = {
    grpc: false,
    grpcWeb: false,
    interceptors: [opsErrors(deps.unforeseen)],
    readMaxBytes: MAX_REQUEST_BYTES,
    writeMaxBytes: MAX_RESPONSE_BYTES,
  };
  return (router) => void router.service(EnvironmentOpsService, service, options);
}
