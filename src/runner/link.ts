import { randomUUID } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { durationMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";
import {
  Directive,
  ObjectKind,
  DeregisterRequest_Reason as Reason,
  RegisterRequestSchema,
  type RegisterResponse,
  type Upsert,
  type WatchResponse,
} from "../../gen/berth/runner/v1/runner_control_pb.js";
import { RunnerStatusSchema } from "../../gen/gitpod/v1/runner_pb.js";
import { HEARTBEAT_MS, PROTOCOL_VERSION } from "../domain/runner.ts";
import type { AutomationReports } from "./automations/reports.ts";
import type { Calls } from "./calls.ts";
import { codeOf, describe } from "./control-plane.ts";
import { type Credentials, RefusedError } from "./credentials.ts";
import type { Environments } from "./environments.ts";
import type { Host } from "./host.ts";
import type { Reports } from "./reports.ts";

/**
 * How a link ended: asked to stop, credential not accepted, data folder of another runner or installation, another
 * process registered, or the runner was deleted.
 */
export type LinkEnd = "stopped" | "refused" | "foreign" | "replaced" | "deleted";

/** What the link works with. */
export interface LinkDeps {
  host: Host;
  credentials: Credentials;
  environments: Environments;
  reports: Reports;
  automations: AutomationReports;
  calls: Calls;
  /** What the runner says about itself. */
  status(): MessageInitShape<typeof RunnerStatusSchema>;
  /** A link is in force. */
  registered(): void;
}

const BACKOFF_MIN_MS = 500;
const BACKOFF_MAX_MS = 10_000;
const SILENCE_MS = 30_000;
const HEARTBEAT_RETRY_MS = 1_000;
const RENEWAL_CHECK_MS = 60 * 60_000;
const GOODBYE_MS = 3_000;
const REFUSALS_NEEDED = 2;

/** Waiting times that double up to ten seconds, each somewhat random so that runners do not come all at once. */
function backoff(): { next(): number; reset(): void } {
  let attempt = 0;
  return {
    next: () => Math.min(BACKOFF_MAX_MS, BACKOFF_MIN_MS * 2 ** attempt++) * (0.5 + Math.random() / 2),
    reset: () => {
      attempt = 0;
    },
  };
}

/** The control plane itself said ABORTED; the transport uses the same code for connections that break. */
function isAborted(error: unknown): boolean {
  const failure = ConnectError.from(error);
  return failure.code === Code.Aborted && failure.cause === undefined;
}

/** The runner's end of the private protocol: it dials, keeps the lease, follows the desired state and reports. */
export class Link {
  readonly #deps: LinkDeps;
  readonly #instanceId = randomUUID();
  readonly #stopping = new AbortController();
  readonly #end = Promise.withResolvers<LinkEnd>();
  #linkId: string | undefined;
  #intervalMs = HEARTBEAT_MS;
  #revision = 0n;
  #draining = false;
  #lastContactAt = 0;
  #hurry: () => void = () => undefined;

  constructor(deps: LinkDeps) {
    this.#deps = deps;
  }

  /** The control plane wants nothing new to be started. */
  get draining(): boolean {
    return this.#draining;
  }

  /** The control plane has answered within the time of a lease. */
  get connected(): boolean {
    return Date.now() - this.#lastContactAt < SILENCE_MS;
  }

  /** Works until the link ends; never rejects. */
  async run(): Promise<LinkEnd> {
    const { signal } = this.#stopping;
    try {
      await this.#register(signal);
      const { reports, automations } = this.#deps;
      const loops = [
        ...[this.#heartbeats(signal), this.#watch(signal), this.#renewals(signal)],
        ...[this.#report(reports, signal), this.#report(automations, signal)],
      ];
      for (const loop of loops) loop.catch((error: unknown) => this.#broken(error));
    } catch (error) {
      this.#broken(error);
    }
    const end = await this.#end.promise;
    this.#stopping.abort();
    return end;
  }

  #broken(error: unknown): void {
    const { log } = this.#deps.host;
    if (this.#stopping.signal.aborted) this.#end.resolve("stopped");
    else if (error instanceof RefusedError) {
      log.error(error.message);
      this.#end.resolve(error.foreign ? "foreign" : "refused");
    } else {
      log.fatal({ err: error }, "the link has failed");
      this.#end.resolve("stopped");
    }
  }

  /** Ends the link and tells the control plane, if it listens. */
  async stop(reason: Reason): Promise<void> {
    this.#end.resolve(reason === Reason.DELETED ? "deleted" : "stopped");
    this.#stopping.abort();
    if (!this.#linkId) return;
    const { control } = this.#deps.host.controlPlane;
    await control.deregister({ linkId: this.#linkId, reason }, { timeoutMs: GOODBYE_MS }).catch((error: unknown) => {
      this.#deps.host.log.warn({ error: describe(error) }, "the control plane was not told of the end");
    });
  }

  async #register(signal: AbortSignal): Promise<void> {
    const { host, credentials, environments, registered } = this.#deps;
    const pause = backoff();
    for (;;) {
      await credentials.signIn(host.controlPlane, signal);
      try {
        return await this.#accept(
          await host.controlPlane.control.register(this.#introduction(environments), { signal }),
          registered,
        );
      } catch (error) {
        signal.throwIfAborted();
        if (error instanceof RefusedError) throw error;
        if (codeOf(error) === Code.Unauthenticated) await credentials.signIn(host.controlPlane, signal, true);
        else host.log.warn({ error: describe(error) }, "the control plane cannot be reached");
      }
      await delay(pause.next(), undefined, { signal });
    }
  }

  #introduction(environments: Environments) {
    const { host, status } = this.#deps;
    return create(RegisterRequestSchema, {
      instanceId: this.#instanceId,
      protocolVersion: PROTOCOL_VERSION,
      status: create(RunnerStatusSchema, status()),
      configurationSchema: host.schema,
      maxEnvironments: host.config.maxEnvironments,
      localEnvironmentIds: environments.ids,
    });
  }

  async #accept(response: RegisterResponse, registered: () => void): Promise<void> {
    const { credentials, environments, reports, automations, host } = this.#deps;
    const { linkId, runner, controlPlaneId, heartbeatInterval } = response;
    await credentials.bind(runner?.runnerId ?? "", controlPlaneId, environments.ids.length > 0);
    this.#linkId = linkId;
    this.#lastContactAt = Date.now();
    if (heartbeatInterval) this.#intervalMs = Math.max(100, durationMs(heartbeatInterval));
    reports.restart();
    automations.restart();
    host.log.info({ linkId, runnerId: runner?.runnerId }, "registered with the control plane");
    registered();
  }

  get #link(): string {
    return this.#linkId ?? "";
  }

  /** A call of another loop was refused: whether the link is over is for the heartbeat to find out. */
  #doubt(error: unknown): void {
    if (codeOf(error) === Code.Unauthenticated || isAborted(error)) this.#hurry();
  }

  async #heartbeats(signal: AbortSignal): Promise<void> {
    const { host, status } = this.#deps;
    let refusals = 0;
    for (;;) {
      let pause = this.#intervalMs;
      try {
        const { directive } = await host.controlPlane.control.heartbeat(
          { linkId: this.#link, status: create(RunnerStatusSchema, status()), appliedRevision: this.#revision },
          { signal, timeoutMs: Math.max(this.#intervalMs, HEARTBEAT_RETRY_MS) },
        );
        this.#lastContactAt = Date.now();
        refusals = 0;
        this.#direct(directive);
      } catch (error) {
        signal.throwIfAborted();
        const isRefused = codeOf(error) === Code.Unauthenticated;
        // Once may be a mistake of something in between.
        refusals = isRefused || isAborted(error) ? refusals + 1 : 0;
        if (refusals >= REFUSALS_NEEDED) return this.#end.resolve(isRefused ? "refused" : "replaced");
        host.log.warn({ error: describe(error) }, "a heartbeat was not answered");
        pause = Math.min(HEARTBEAT_RETRY_MS, this.#intervalMs);
      }
      await this.#pause(pause, signal);
    }
  }

  async #pause(ms: number, signal: AbortSignal): Promise<void> {
    const early = new AbortController();
    this.#hurry = () => early.abort();
    await delay(ms, undefined, { signal: AbortSignal.any([signal, early.signal]) }).catch(() =>
      signal.throwIfAborted(),
    );
  }

  #direct(directive: Directive): void {
    if (directive === Directive.SHUTDOWN) this.#end.resolve("deleted");
    const wasDraining = this.#draining;
    this.#draining = directive === Directive.DRAIN;
    if (wasDraining && !this.#draining) this.#deps.environments.wakeAll();
  }

  async #watch(signal: AbortSignal): Promise<void> {
    const { host } = this.#deps;
    const pause = backoff();
    for (;;) {
      const silence = new AbortController();
      const timer = setTimeout(() => silence.abort(new Error("silence")), SILENCE_MS);
      try {
        const options = { signal: AbortSignal.any([signal, silence.signal]), timeoutMs: 0 };
        const request = { linkId: this.#link, resumeRevision: this.#revision };
        for await (const { event } of host.controlPlane.control.watch(request, options)) {
          timer.refresh();
          pause.reset();
          await this.#apply(event, signal);
        }
      } catch (error) {
        signal.throwIfAborted();
        if (error instanceof RefusedError) throw error;
        this.#doubt(error);
        host.log.warn({ error: describe(error) }, "the stream of desired state broke");
      } finally {
        clearTimeout(timer);
      }
      await delay(pause.next(), undefined, { signal });
    }
  }

  async #apply(event: WatchResponse["event"], signal: AbortSignal): Promise<void> {
    const { credentials, environments, calls } = this.#deps;
    switch (event.case) {
      case "snapshotBegin":
        if (event.value.controlPlaneId !== credentials.controlPlaneId) {
          throw new RefusedError("the desired state comes from another installation", true);
        }
        return environments.beginSnapshot();
      case "upsert":
        await this.#upsert(event.value.object);
        return this.#applied(event.value.revision);
      case "remove":
        if (event.value.kind === ObjectKind.ENVIRONMENT) await environments.remove(event.value.id);
        else environments.removeAutomation(event.value.id);
        return this.#applied(event.value.revision);
      case "snapshotEnd":
        environments.endSnapshot();
        return this.#applied(event.value.revision);
      case "bookmark":
        return this.#applied(event.value.revision);
      case "call":
        return calls.accept(event.value, signal);
      case "directive":
        return this.#direct(event.value);
    }
  }

  async #upsert(object: Upsert["object"]): Promise<void> {
    const { environments } = this.#deps;
    switch (object.case) {
      case "organizationPolicies":
        this.#deps.host.policies = object.value;
        return;
      case "environment":
        return environments.upsert(object.value);
      case "service":
        return environments.wantService(object.value);
      case "taskExecution":
        return environments.wantExecution(object.value);
    }
  }

  #applied(revision: bigint): void {
    if (revision > this.#revision) this.#revision = revision;
  }

  async #report(reports: Reports | AutomationReports, signal: AbortSignal): Promise<void> {
    const { host } = this.#deps;
    const pause = backoff();
    for (;;) {
      await reports.waiting(signal);
      signal.throwIfAborted();
      try {
        await reports.flush(host.controlPlane, this.#link, signal);
        pause.reset();
      } catch (error) {
        signal.throwIfAborted();
        this.#doubt(error);
        host.log.warn({ error: describe(error) }, "reports could not be delivered");
        await delay(pause.next(), undefined, { signal });
      }
    }
  }

  async #renewals(signal: AbortSignal): Promise<void> {
    const { host, credentials } = this.#deps;
    for (;;) {
      await credentials.renewIfDue(host.controlPlane, signal).catch((error: unknown) => {
        host.log.warn({ error: describe(error) }, "the access token could not be renewed");
      });
      await delay(RENEWAL_CHECK_MS, undefined, { signal });
    }
  }
}
