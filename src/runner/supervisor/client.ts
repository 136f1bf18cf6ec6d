import { lstatSync } from "node:fs";
import { request as httpRequest } from "node:http";
import { type Client, Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { EnvironmentOpsService } from "../../../gen/supervisor/v1/environmentopts_pb.js";
import type { ActivitySource } from "./activity.ts";
import { linesOf } from "./automation/link.ts";
import type { ToRunner, ToSupervisor } from "./automation/talk.ts";
import { errnoOf } from "./errors.ts";
import { MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES } from "./ops.ts";
import type { SupervisorState } from "./private-http.ts";

/** A conversation about services and executions; its messages end, or throw, when the supervisor goes. */
export interface AutomationChannel {
  readonly messages: AsyncIterable<ToRunner>;
  send(message: ToSupervisor): void;
  close(): void;
}

/** Calls to the supervisor of one environment. Whatever keeps it from answering is UNAVAILABLE. */
export interface SupervisorClient extends Client<typeof EnvironmentOpsService> {
  /** Its state; UNAVAILABLE if it does not answer within the time, default 2 s. */
  health(timeoutMs?: number): Promise<SupervisorState>;
  /** Where relative paths, commands and git calls start from now on. */
  setWorkspaceFolder(path: string): Promise<void>;
  /** Opens the conversation about services and executions; another one that is open ends. */
  automations(): Promise<AutomationChannel>;
}

const SOURCES: readonly ActivitySource[] = ["Ops API", "Terminal", "Automations"];
const CONTROL_TIMEOUT_MS = 2000;
const MAX_STATE_BYTES = 64 * 1024;
const MAX_NEWS_BYTES = 1024 * 1024;
const UNREACHABLE = new Set([
  "ENOENT",
  "ENOTSOCK",
  "ECONNREFUSED",
  "ECONNRESET",
  "EACCES",
  "EPIPE",
  "EPROTOTYPE",
  "EAGAIN",
]);

const unavailable = (cause?: unknown) =>
  new ConnectError("the environment's supervisor does not answer", Code.Unavailable, undefined, undefined, cause);

function translate(error: unknown): unknown {
  for (let cause = error; cause instanceof Error; cause = cause.cause) {
    if (UNREACHABLE.has(errnoOf(cause) ?? "")) return unavailable(error);
  }
  return error;
}

async function* translated<T>(messages: AsyncIterable<T>): AsyncIterable<T> {
  try {
    yield* messages;
  } catch (error) {
    throw translate(error);
  }
}

// The socket lies where the environment's user may write: a link to another program's socket must not be followed.
function checkSocket(path: string, uid: number | undefined): void {
  const found = lstatSync(path, { throwIfNoEntry: false });
  if (!found?.isSocket() || (uid !== undefined && found.uid !== uid)) throw unavailable();
}

function guarded(path: string, uid: number | undefined): Interceptor {
  return (next) => async (request) => {
    checkSocket(path, uid);
    try {
      const response = await next(request);
      return response.stream ? { ...response, message: translated(response.message) } : response;
    } catch (error) {
      throw translate(error);
    }
  };
}

interface ControlCall {
  socketPath: string;
  /** The environment it is meant for. */
  host: string;
  method: string;
  path: string;
}

function control(target: ControlCall, body: string, timeoutMs: number): Promise<string> {
  return new Promise((resolve, reject) => {
    const signal = AbortSignal.timeout(timeoutMs);
    const call = httpRequest({ ...target, agent: false, signal }, (response) => {
      let text = "";
      response.setEncoding("utf8");
      response.on("data", (chunk: string) => {
        text += chunk;
        if (text.length > MAX_STATE_BYTES) call.destroy(new Error("answer too long"));
      });
      response.once("error", (error) => reject(unavailable(error)));
      response.once("end", () => {
        if ((response.statusCode ?? 500) < 300) resolve(text);
        else reject(new ConnectError(`supervisor answered ${response.statusCode}`, Code.InvalidArgument));
      });
    });
    call.once("error", (error) => reject(unavailable(error)));
    call.end(body);
  });
}

function openChannel(target: ControlCall, timeoutMs: number): Promise<AutomationChannel> {
  return new Promise((resolve, reject) => {
    const call = httpRequest({ ...target, agent: false });
    const timer = setTimeout(() => call.destroy(new Error("no answer")), timeoutMs);
    call.once("error", (error) => reject(unavailable(error)));
    call.once("response", (response) => {
      clearTimeout(timer);
      // What breaks it off later shows in the messages.
      call.on("error", () => undefined);
      if (response.statusCode !== 200) {
        call.destroy();
        return reject(new ConnectError(`supervisor answered ${response.statusCode}`, Code.Unavailable));
      }
      resolve({
        messages: messagesOf(response),
        send: (message) => void (call.destroyed || call.write(`${JSON.stringify(message)}\n`)),
        close: () => call.destroy(),
      });
    });
    call.flushHeaders();
  });
}

async function* messagesOf(response: AsyncIterable<Buffer>): AsyncGenerator<ToRunner> {
  for await (const line of linesOf(response, MAX_NEWS_BYTES)) yield JSON.parse(line) as ToRunner;
}

function parseState(text: string): SupervisorState {
  const value: unknown = JSON.parse(text);
  if (typeof value !== "object" || value === null) throw unavailable();
  const state = value as Record<keyof SupervisorState, unknown>;
  const { pid, startTime, version, environmentId, workspaceFolder, runningExecs } = state;
  const wellFormed =
    [pid, startTime, runningExecs].every(Number.isSafeInteger) &&
    [version, environmentId, workspaceFolder].every((text) => typeof text === "string");
  if (!wellFormed) throw unavailable();
  return { ...(value as SupervisorState), activity: parseActivity(state.activity) };
}

function parseActivity(value: unknown): SupervisorState["activity"] {
  if (typeof value !== "object" || value === null) return undefined;
  const { source, at } = value as Record<string, unknown>;
  const time = new Date(String(at));
  const known = SOURCES.find((each) => each === source);
  return known && !Number.isNaN(time.getTime()) ? { source: known, at: time } : undefined;
}

/**
 * Reaches the supervisor of an environment over its socket; with `uid`, only a socket of that user counts. Each request
 * names the environment as its host, so that the supervisor of another one refuses it even if the path was exchanged
 * for a link after it was looked at. Opens nothing by itself.
 */
export function connectSupervisor(
  socketPath: string,
  environmentId: string,
  { uid }: { uid?: number } = {},
): SupervisorClient {
  const target = { socketPath, host: environmentId };
  const transport = createConnectTransport({
    baseUrl: `http://${environmentId}`,
    httpVersion: "1.1",
    // One connection per call: a pooled one would fail once after each restart of the supervisor.
    nodeOptions: { socketPath, agent: false },
    interceptors: [guarded(socketPath, uid)],
    acceptCompression: [],
    readMaxBytes: MAX_RESPONSE_BYTES,
    writeMaxBytes: MAX_REQUEST_BYTES,
  });
  return Object.assign(createClient(EnvironmentOpsService, transport), {
    async health(timeoutMs = CONTROL_TIMEOUT_MS) {
      checkSocket(socketPath, uid);
      return parseState(await control({ ...target, method: "GET", path: "/healthz" }, "", timeoutMs));
    },
    async automations() {
      checkSocket(socketPath, uid);
      return await openChannel({ ...target, method: "POST", path: "/automations" }, CONTROL_TIMEOUT_MS);
    },
    async setWorkspaceFolder(path: string) {
      checkSocket(socketPath, uid);
      await control({ ...target, method: "PUT", path: "/workspace-folder" }, path, CONTROL_TIMEOUT_MS);
    },
  });
}

/** Operations of one supervisor, with those about git of another one. */
export const withGitOf = (git: SupervisorClient, other: SupervisorClient): SupervisorClient => ({
  ...other,
  getGitStatus: git.getGitStatus,
  getGitDiff: git.getGitDiff,
  getGitDiffFiles: git.getGitDiffFiles,
  getFileDiffContent: git.getFileDiffContent,
  getDefaultBranch: git.getDefaultBranch,
});
