import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { type Client, createClient } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import {
  type AutomationReportResult,
  type DesiredService,
  type DesiredTaskExecution,
  type ReportResult,
  RunnerControlService,
  type Upsert,
  type WatchResponse,
} from "../../gen/berth/runner/v1/runner_control_pb.js";
import { ServiceStatusSchema, TaskExecutionStatusSchema } from "../../gen/gitpod/v1/environment_automation_pb.js";
import {
  EnvironmentStatus_RunnerACK_StatusCode as Ack,
  EnvironmentStatus_ContentPhase as ContentPhase,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  type Environment,
  EnvironmentStatusSchema,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../../gen/gitpod/v1/environment_pb.js";
import { RunnerPhase, type RunnerStatusSchema } from "../../gen/gitpod/v1/runner_pb.js";
import { type HostFacts, linuxHostSchema } from "../../src/domain/environment-class.ts";
import { PROTOCOL_VERSION } from "../../src/domain/runner.ts";
import { eventually } from "./wait.ts";

const HOST: HostFacts = { cpuCores: 8, memoryMib: 16_384, diskGib: 100, hasContainerEngine: false };

/** A runner that speaks the private protocol and reports whatever a test wants. */
export class FakeRunner implements AsyncDisposable {
  readonly control: Client<typeof RunnerControlService>;
  readonly token: string;
  id = "";
  linkId = "";
  epoch = 0n;
  /** Everything that the watch stream has delivered. */
  readonly seen: WatchResponse["event"][] = [];
  readonly #stop = new AbortController();
  #seq = 0n;
  #watching: Promise<void> = Promise.resolve();

  constructor(url: string, token: string) {
    this.token = token;
    this.control = createClient(
      RunnerControlService,
      createConnectTransport({
        baseUrl: url,
        httpVersion: "1.1",
        interceptors: [
          (next) => (request) => {
            request.header.set("authorization", `Bearer ${token}`);
            return next(request);
          },
        ],
      }),
    );
  }

  /** Registers; the older link, if there is one, ends. */
  async register(
    options: {
      maxEnvironments?: number;
      localEnvironmentIds?: string[];
      status?: MessageInitShape<typeof RunnerStatusSchema>;
      /** The machine whose schema it publishes. */
      host?: HostFacts;
    } = {},
  ): Promise<void> {
    const response = await this.control.register({
      instanceId: "test",
      protocolVersion: PROTOCOL_VERSION,
      status: { phase: RunnerPhase.ACTIVE, version: "test", publicKey: new Uint8Array(32), ...options.status },
      configurationSchema: linuxHostSchema("", options.host ?? HOST),
      maxEnvironments: options.maxEnvironments ?? 100,
      localEnvironmentIds: options.localEnvironmentIds ?? [],
    });
    this.id = response.runner?.runnerId ?? "";
    this.linkId = response.linkId;
    this.epoch = response.epoch;
  }

  heartbeat(status: MessageInitShape<typeof RunnerStatusSchema> = {}) {
    return this.control.heartbeat({
      linkId: this.linkId,
      status: { phase: RunnerPhase.ACTIVE, version: "test", publicKey: new Uint8Array(32), ...status },
    });
  }

  /** Another process of the same link, for example one that calls another replica. */
  twin(url: string): FakeRunner {
    const { id, linkId, epoch } = this;
    return Object.assign(new FakeRunner(url, this.token), { id, linkId, epoch });
  }

  /**
   * Collects what the watch stream delivers until the runner is disposed of. The promise is how the stream ends; nobody
   * needs to wait for it.
   */
  watch(resumeRevision = 0n): Promise<void> {
    this.#watching = (async () => {
      try {
        const stream = this.control.watch({ linkId: this.linkId, resumeRevision }, { signal: this.#stop.signal });
        for await (const response of stream) this.seen.push(response.event);
      } catch (error) {
        if (!this.#stop.signal.aborted) throw error;
      }
    })();
    this.#watching.catch(() => undefined);
    return this.#watching;
  }

  async report(
    environmentId: string,
    status: MessageInitShape<typeof EnvironmentStatusSchema>,
    seq = ++this.#seq,
  ): Promise<ReportResult> {
    const items = [{ environmentId, seq, status: create(EnvironmentStatusSchema, status) }];
    const { results } = await this.control.reportEnvironments({ linkId: this.linkId, items });
    const [result] = results;
    if (!result) throw new Error("the report was not judged");
    return result;
  }

  /** Reports an environment as running, as the shipped runner would: everything in one report. */
  reportRunning(environment: Environment): Promise<ReportResult> {
    return this.report(environment.id, runningStatus(environment));
  }

  reportMachine(environment: Environment, phase: MachinePhase): Promise<ReportResult> {
    const status = runningStatus(environment);
    return this.report(environment.id, { ...status, machine: { ...status.machine, phase } });
  }

  async reportService(
    id: string,
    status: MessageInitShape<typeof ServiceStatusSchema>,
    seq = ++this.#seq,
  ): Promise<AutomationReportResult> {
    const services = [{ id, seq, status: create(ServiceStatusSchema, status) }];
    const { services: results } = await this.control.reportAutomations({ linkId: this.linkId, services });
    const [result] = results;
    if (!result) throw new Error("the report was not judged");
    return result;
  }

  async reportExecution(
    id: string,
    status: MessageInitShape<typeof TaskExecutionStatusSchema>,
    seq = ++this.#seq,
  ): Promise<AutomationReportResult> {
    const executions = [{ id, seq, status: create(TaskExecutionStatusSchema, status) }];
    const { executions: results } = await this.control.reportAutomations({ linkId: this.linkId, executions });
    const [result] = results;
    if (!result) throw new Error("the report was not judged");
    return result;
  }

  /** The newest desired state of a service that satisfies a condition. */
  desiredService(id: string, accept: (desired: DesiredService) => boolean = () => true): Promise<DesiredService> {
    return this.#newest(id, (object) =>
      object.case === "service" && object.value.service?.id === id && accept(object.value) ? object.value : undefined,
    );
  }

  /** The newest desired state of an execution that satisfies a condition. */
  desiredExecution(
    id: string,
    accept: (desired: DesiredTaskExecution) => boolean = () => true,
  ): Promise<DesiredTaskExecution> {
    return this.#newest(id, (object) =>
      object.case === "taskExecution" && object.value.taskExecution?.id === id && accept(object.value)
        ? object.value
        : undefined,
    );
  }

  /** Waits until the stream has said that an object is gone. */
  removed(id: string): Promise<unknown> {
    return eventually(
      () => this.seen.some((event) => event.case === "remove" && event.value.id === id),
      `the removal of ${id}`,
    );
  }

  #newest<T>(id: string, pick: (object: Upsert["object"]) => T | undefined): Promise<T> {
    return eventually(() => {
      for (const event of [...this.seen].reverse()) {
        const found = event.case === "upsert" ? pick(event.value.object) : undefined;
        if (found) return found;
      }
      return undefined;
    }, `the desired state of ${id}`);
  }

  /** The newest desired state of an environment that satisfies a condition. */
  desired(environmentId: string, accept: (environment: Environment) => boolean = () => true): Promise<Environment> {
    return this.#newest(environmentId, (object) => {
      const environment = object.case === "environment" ? object.value.environment : undefined;
      return environment?.id === environmentId && accept(environment) ? environment : undefined;
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stop.abort();
    await this.#watching.catch(() => undefined);
  }
}

/** What a runner reports about an environment whose start has succeeded. */
export function runningStatus({ id, spec }: Environment) {
  return {
    runnerAck: { specVersion: spec?.specVersion ?? 0n, statusCode: Ack.OK },
    machine: { session: spec?.machine?.session ?? "", phase: MachinePhase.RUNNING as MachinePhase },
    content: { session: spec?.content?.session ?? "", phase: ContentPhase.READY as ContentPhase },
    devcontainer: { session: spec?.devcontainer?.session ?? "", phase: DevContainerPhase.RUNNING },
    secrets: (spec?.secrets ?? []).map(({ id, session, name: secretName }) => ({
      ...{ id, session, secretName, phase: ContentPhase.READY },
    })),
    environmentUrls: { logs: `http://runner/environments/${id}/logs`, ops: `http://runner/environments/${id}/ops` },
  };
}
