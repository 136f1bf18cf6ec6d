import { expect } from "vitest";
import { type AdmissionLevel, EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import { getEnvironment, operations, reaches } from "./environments.ts";
import type { TestUser } from "./plane.ts";
import { eventually } from "./wait.ts";

// Says what it is asked, sends people around, and echoes what comes through a WebSocket.
const SERVICE = `
  const { createServer } = require("node:http");
  const { createHash } = require("node:crypto");
  const server = createServer((request, response) => {
    if (request.url === "/moved") return response.writeHead(302, { location: "/there", "set-cookie": "a=b; Path=/" }).end();
    let body = "";
    request.on("data", (chunk) => (body += chunk)).on("end", () => {
      response.setHeader("content-type", "application/json");
      response.end(JSON.stringify({ who: process.argv[2], method: request.method, url: request.url, headers: request.headers, body }));
    });
  });
  server.on("upgrade", (request, socket) => {
    const accept = createHash("sha1").update(request.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest("base64");
    socket.write("HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\nSec-WebSocket-Accept: " + accept + "\\r\\n\\r\\n");
    socket.on("error", () => {});
    socket.on("data", (frame) => {
      const length = frame[1] & 127;
      if ((frame[0] & 15) !== 1) return socket.end();
      const mask = frame.subarray(2, 6);
      const text = Buffer.from(frame.subarray(6, 6 + length).map((byte, index) => byte ^ mask[index % 4]));
      socket.write(Buffer.concat([Buffer.from([0x81, text.length]), text]));
    });
  });
  server.listen(Number(process.argv[1]), "127.0.0.1");
`;

/** An environment of somebody, which runs; its id. */
export async function runningEnvironment(user: TestUser, classId: string): Promise<string> {
  const { environment } = await user.client.environments.createEnvironment({ spec: { machine: { class: classId } } });
  return (await reaches(user.client, environment?.id ?? "", EnvironmentPhase.RUNNING)).id;
}

/** Starts a service inside an environment, which answers in JSON what it is asked; resolves when it listens. */
export async function servePort(user: TestUser, environmentId: string, port: number, name: string): Promise<void> {
  const ops = await operations(user.client, environmentId);
  const script = Buffer.from(SERVICE).toString("base64");
  const run = `eval(Buffer.from("${script}", "base64").toString())`;
  const command = `setsid '${process.execPath}' -e '${run}' ${port} ${name} >/dev/null 2>&1 &`;
  expect((await ops.exec({ command })).exitCode).toBe(0);
  await eventually(async () => (await fetch(`http://127.0.0.1:${port}/`)).ok, "the service answers");
}

/** Sets the admission of the only port and resolves with its URL once the runner has heard of it. */
export async function admitPort(
  creator: TestUser,
  environmentId: string,
  port: number,
  admission: AdmissionLevel,
): Promise<string> {
  const ports = [{ port, name: "web", admission }];
  await creator.client.environments.updateEnvironment({ environmentId, spec: { ports } });
  return eventually(async () => {
    const { spec, status } = await getEnvironment(creator.client, environmentId);
    if (status?.runnerAck?.specVersion !== spec?.specVersion) return undefined;
    return status?.environmentUrls?.ports.find((each) => each.port === port)?.url ?? "closed";
  }, "the runner knows the port");
}
