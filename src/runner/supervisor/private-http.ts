import type { IncomingMessage, ServerResponse } from "node:http";
import { isAbsolute } from "node:path";
import type { LastActivity } from "./activity.ts";

/** What a supervisor tells about itself. */
export interface SupervisorState {
  pid: number;
  /** Clock ticks since boot, field 22 of `/proc/<pid>/stat`. */
  startTime: number;
  version: string;
  environmentId: string;
  workspaceFolder: string;
  runningExecs: number;
  /** Services and tasks that are at work in the dev container. */
  inDevContainer: number;
  /** Latest use through the operations; "now" while a command runs. */
  activity?: LastActivity;
}

/** Header of the runner's own calls: nobody is at work because of them. */
export const UNATTENDED = "berth-unattended";

const MAX_BODY_BYTES = 8192;

export const isControl = (request: IncomingMessage) =>
  ["/healthz", "/workspace-folder", "/automations", "/run", "/login"].includes(request.url ?? "");

/**
 * For the runner only, on the supervisor's socket: `GET /healthz` answers SupervisorState as JSON,
 * `PUT /workspace-folder` takes the absolute path of the primary checkout as its body, `POST /automations` opens the
 * conversation about services and executions, `POST /run` runs a command in a container, `POST /login` is somebody who
 * has logged in.
 */
export function controlHandler(supervisor: {
  health(): SupervisorState;
  setWorkspaceFolder(path: string): void;
  automations(request: IncomingMessage, response: ServerResponse): void;
  run(request: IncomingMessage, response: ServerResponse): void;
  login(request: IncomingMessage, response: ServerResponse): void;
}): (request: IncomingMessage, response: ServerResponse) => void {
  const conversations = new Map([
    ["/automations", supervisor.automations],
    ["/run", supervisor.run],
    ["/login", supervisor.login],
  ]);
  return (request, response) => {
    const answer = (status: number, body = "") => {
      response.writeHead(status, { "content-type": "application/json" });
      response.end(body);
    };
    if (request.url === "/healthz") return answer(200, JSON.stringify(supervisor.health()));
    const converse = conversations.get(request.url ?? "");
    if (converse) return request.method === "POST" ? converse(request, response) : answer(405);
    if (request.method !== "PUT") return answer(405);
    let body = "";
    request.setEncoding("utf8");
    request.on("data", (chunk: string) => {
      body = (body + chunk).slice(0, MAX_BODY_BYTES + 1);
    });
    request.once("end", () => {
      if (body.length > MAX_BODY_BYTES || !isAbsolute(body) || body.includes("\0")) return answer(400);
      supervisor.setWorkspaceFolder(body);
      answer(204);
    });
  };
}
