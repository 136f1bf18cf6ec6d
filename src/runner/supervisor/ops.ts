import type { ConnectRouter, HandlerContext, ServiceImpl } from "@connectrpc/connect";
import { Capability, EnvironmentOpsService } from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { openStream } from "./connect-handler.ts";
import { opsErrors } from "./errors.ts";
import { MAX_FILE_BYTES, readFile, writeFile } from "./files.ts";
import { find } from "./find.ts";
import { defaultBranch } from "./git-branch.ts";
import { changedFiles } from "./git-changes.ts";
import type { GitOptions } from "./git-command.ts";
import { fileDiffContent, gitDiff } from "./git-diff.ts";
import { gitStatus } from "./git-status.ts";
import { terminalOps } from "./ops-terminals.ts";
import { type OpsDeps, opsTools } from "./ops-tools.ts";
import { UNATTENDED } from "./private-http.ts";

/** Largest request message: a file at its limit plus the other fields. */
export const MAX_REQUEST_BYTES = MAX_FILE_BYTES + 1024 * 1024;
/** Largest answer: two output streams of 8 MiB in which every byte became a three-byte replacement character. */
export const MAX_RESPONSE_BYTES = 64 * 1024 * 1024;

const isUnattended = ({ requestHeader }: HandlerContext) => requestHeader.has(UNATTENDED);

/** Serves EnvironmentOpsService with the rights of the process it runs in. */
export function createOpsRoutes(deps: OpsDeps): (router: ConnectRouter) => void {
  const { execs, watches, activity } = deps;
  const tools = opsTools(deps);
  const { absolute, directory, inTime, heavyInTime, streamed } = tools;
  const withGit = <T>(what: string, work: (options: GitOptions) => Promise<T>) =>
    heavyInTime(what, () => work({ directory: deps.workspaceFolder(), env: deps.environment() }));
  const service: ServiceImpl<typeof EnvironmentOpsService> = {
    async exec(request, context) {
      const result = execs.exec(request, directory(request.workingDirectory));
      return await (isUnattended(context) ? result : activity.during("Ops API", result));
    },
    cancelExec({ operationId }, context) {
      if (!isUnattended(context)) activity.onActivity("Ops API");
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
    ...terminalOps(deps, tools),
    async *watch(request, context) {
      yield* streamed(watches.watch(request, context.signal, () => openStream(context)));
    },
    listCapabilities: () => ({ capabilities: [Capability.WATCH] }),
  };
  const options = {
    grpc: false,
    grpcWeb: false,
    interceptors: [opsErrors(deps.unforeseen)],
    readMaxBytes: MAX_REQUEST_BYTES,
    writeMaxBytes: MAX_RESPONSE_BYTES,
  };
  return (router) => void router.service(EnvironmentOpsService, service, options);
}
