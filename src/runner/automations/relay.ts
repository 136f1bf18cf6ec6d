import { fromJson, toJson } from "@bufbuild/protobuf";
import type { DesiredService, DesiredTaskExecution } from "../../../gen/berth/runner/v1/runner_control_pb.js";
import {
  ServiceSchema,
  ServiceStatusSchema,
  TaskExecutionSchema,
  TaskExecutionStatusSchema,
} from "../../../gen/gitpod/v1/environment_automation_pb.js";
import {
  ContainerProblem,
  type EnvironmentContainers,
  type StartedContainer,
} from "../containers/environment-containers.ts";
import type { ToRunner, ToSupervisor } from "../supervisor/automation/talk.ts";
import type { AutomationChannel, SupervisorClient } from "../supervisor/client.ts";
import type { AutomationReports } from "./reports.ts";

/** What a relay works with. */
export interface RelayDeps {
  reports: AutomationReports;
  logDays: number;
  /** Address of the environment's logs, without a slash at the end. */
  logBase(): string;
  /** Values of secrets for the environment; those that it may not have are absent. */
  secrets(ids: readonly string[]): Promise<Record<string, string>>;
  containers: Pick<EnvironmentContainers, "start" | "exec" | "remove" | "keepOnly">;
  failed(error: unknown): void;
}

const RETRY_MS = 500;

/**
 * Carries what is wanted of the services and executions of one environment to its supervisor, and how they fare back.
 * Keeps what is wanted, so that a supervisor that comes anew hears all of it.
 */
export class AutomationRelay {
  readonly #deps: RelayDeps;
  readonly #services = new Map<string, DesiredService>();
  readonly #executions = new Map<string, DesiredTaskExecution>();
  #channel: AutomationChannel | undefined;
  #client: SupervisorClient | undefined;
  #isReady = false;
  #isComplete = false;

  constructor(deps: RelayDeps) {
    this.#deps = deps;
  }

  wantService(desired: DesiredService): void {
    const id = desired.service?.id ?? "";
    this.#services.set(id, desired);
    this.#send(serviceMessage(desired));
  }

  wantExecution(desired: DesiredTaskExecution): void {
    const id = desired.taskExecution?.id ?? "";
    this.#executions.set(id, desired);
    this.#send(executionMessage(desired));
  }

  /** True if it was one of this environment. */
  remove(id: string): boolean {
    const isOurs = this.#services.delete(id) || this.#executions.delete(id);
    if (isOurs) this.#send({ type: "remove", id });
    return isOurs;
  }

  /** All that there is has been said once; before that a supervisor would take what is missing for gone. */
  complete(): void {
    this.#isComplete = true;
  }

  /** Only these are left. */
  keepOnly(ids: ReadonlySet<string>): void {
    for (const id of [...this.#services.keys(), ...this.#executions.keys()]) if (!ids.has(id)) this.remove(id);
  }

  /** The supervisor to talk to, and whether the environment is up; undefined while there is none. */
  connect(client: SupervisorClient | undefined, isReady: boolean): void {
    if (client && !this.#isComplete) return;
    const wasReady = this.#isReady;
    this.#isReady = isReady;
    if (client === this.#client) {
      if (isReady !== wasReady) this.#send(this.#facts());
      return;
    }
    this.#client = client;
    this.#channel?.close();
    this.#channel = undefined;
    if (client) void this.#talk(client);
  }

  #facts(): ToSupervisor {
    const { logDays, logBase } = this.#deps;
    return { type: "facts", logDays, logBase: logBase(), isReady: this.#isReady };
  }

  async #talk(client: SupervisorClient): Promise<void> {
    while (this.#client === client) {
      try {
        const channel = await client.automations();
        if (this.#client !== client) return channel.close();
        this.#channel = channel;
        this.#send(this.#facts());
        this.#send({ type: "begin" });
        for (const desired of this.#services.values()) this.#send(serviceMessage(desired));
        for (const desired of this.#executions.values()) this.#send(executionMessage(desired));
        this.#send({ type: "end" });
        for await (const message of channel.messages) this.#hear(message, channel);
      } catch (error) {
        this.#deps.failed(error);
      }
      this.#channel = undefined;
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS).unref());
    }
  }

  #hear(message: ToRunner, channel: AutomationChannel): void {
    const { reports, secrets, failed } = this.#deps;
    switch (message.type) {
      case "service": {
        const status = fromJson(ServiceStatusSchema, message.status, { ignoreUnknownFields: true });
        if (this.#services.has(message.id)) reports.pushService(message.id, status);
        return;
      }
      case "execution": {
        const { id, startedAt, completedAt } = message;
        const status = fromJson(TaskExecutionStatusSchema, message.status, { ignoreUnknownFields: true });
        if (this.#executions.has(id)) reports.pushExecution(id, { status, startedAt, completedAt });
        return;
      }
      case "secrets": {
        const { ask } = message;
        secrets(message.ids).then(
          (values) => channel.send({ type: "secrets", ask, values }),
          (error: unknown) => {
            failed(error);
            channel.send({ type: "secrets", ask });
          },
        );
        return;
      }
      case "container-start": {
        const { ask, run, image } = message;
        const onOutput = (text: string) => channel.send({ type: "container-output", ask, text });
        void this.#answer(ask, channel, () => this.#deps.containers.start(run, image, onOutput));
        return;
      }
      case "container-exec": {
        const { ask, run, part, mark } = message;
        void this.#answer(ask, channel, () => this.#deps.containers.exec(run, part, mark));
        return;
      }
      case "container-remove":
        this.#deps.containers.remove(message.run).catch(failed);
        return;
      case "containers":
        this.#deps.containers.keepOnly(message.runs).catch(failed);
    }
  }

  /** Tells what became of a container; what only the runner's operator can do something about stays in its log. */
  async #answer(
    ask: number,
    channel: AutomationChannel,
    work: () => Promise<Partial<StartedContainer>>,
  ): Promise<void> {
    const none = { type: "container", ask, pid: 0, shared: "" } as const;
    try {
      channel.send({ ...none, ...(await work()), problem: "" });
    } catch (error) {
      const isPlain = error instanceof ContainerProblem;
      if (!isPlain) this.#deps.failed(error);
      channel.send({ ...none, problem: isPlain ? error.message : "the runner could not start the container" });
    }
  }

  #send(message: ToSupervisor): void {
    this.#channel?.send(message);
  }
}

const serviceMessage = ({ service, startedBy }: DesiredService): ToSupervisor => ({
  ...{ type: "service", service: service ? toJson(ServiceSchema, service) : {}, startedBy },
});

const executionMessage = ({ taskExecution, firingId }: DesiredTaskExecution): ToSupervisor => ({
  ...{ type: "execution", execution: taskExecution ? toJson(TaskExecutionSchema, taskExecution) : {}, firingId },
  startedBy: taskExecution?.metadata?.startedBy ?? "",
});
