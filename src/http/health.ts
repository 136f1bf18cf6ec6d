import { setTimeout as delay } from "node:timers/promises";
import { Code, ConnectError, type HandlerContext, type ServiceImpl } from "@connectrpc/connect";
import {
  type Health,
  type HealthCheckRequest,
  HealthCheckResponse_ServingStatus as Status,
} from "../../gen/grpc/health/v1/health_pb.js";
import { streamOpened } from "../rpc/call.ts";
import type { Readiness } from "./readiness.ts";

const POLL_MS = 2000;

/** grpc.health.v1 for the server as a whole and for each of `services`, which are ready together. */
export function healthService(readiness: Readiness, services: () => readonly string[]): ServiceImpl<typeof Health> {
  const isKnown = (service: string) => service === "" || services().includes(service);
  const status = async () => ((await readiness.check()).ok ? Status.SERVING : Status.NOT_SERVING);
  return {
    async check({ service }) {
      if (!isKnown(service)) throw new ConnectError("unknown service", Code.NotFound);
      return { status: await status() };
    },
    async list() {
      const now = await status();
      return { statuses: Object.fromEntries(["", ...services()].map((service) => [service, { status: now }])) };
    },
    async *watch({ service }: HealthCheckRequest, context: HandlerContext) {
      streamOpened(context);
      let told: Status | undefined;
      while (!context.signal.aborted) {
        const now = isKnown(service) ? await status() : Status.SERVICE_UNKNOWN;
        if (now !== told) yield { status: now };
        told = now;
        await delay(POLL_MS, undefined, { signal: context.signal });
      }
    },
  };
}
