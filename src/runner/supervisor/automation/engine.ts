import { existsSync, mkdirSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import type { ServiceStatus, TaskExecutionSpec_Step } from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import { ENDED } from "../../../domain/automation-execution.ts";
import { runOf } from "../../../domain/automation-plan.ts";
import { ExecutionMachine, type ExecutionRecord, type ExecutionWish } from "./execution.ts";
import { pruneLogs } from "./log-folders.ts";
import { keyOf, type News, type Surroundings } from "./parts.ts";
import { Records } from "./records.ts";
import { ServiceMachine, type ServiceRecord, type ServiceWish } from "./service.ts";
import { CONTAINER_FILE } from "./start.ts";
import { EARLY } from "./targets.ts";
import { type TaskRecord, TaskRun } from "./task-run.ts";

// Runs the services and executions of one environment: takes what is wanted of each, and tells how each fares.

/** Executions that have ended and are still remembered. */
const ENDED_KEPT = 200;
const PRUNE_MS = 6 * 60 * 60_000;

/** Everything that is wanted, as far as it has been said. */
export class AutomationEngine {
  readonly #around: Surroundings;
  readonly #tell: (news: News) => void;
  readonly #services: { records: Records<ServiceRecord>; machines: Map<string, ServiceMachine> };
  readonly #executions: { records: Records<ExecutionRecord>; machines: Map<string, ExecutionMachine> };
  readonly #tasks: { records: Records<TaskRecord>; runs: Map<string, TaskRun> };
  #isReady = false;
  #isClosing = false;

  constructor(around: Surroundings, tell: (news: News) => void) {
    this.#around = around;
    this.#tell = tell;
    const { state } = around;
    mkdirSync(join(state, "runs"), { recursive: true, mode: 0o700 });
    this.#services = { records: new Records(join(state, "services")), machines: new Map() };
    this.#executions = { records: new Records(join(state, "executions")), machines: new Map() };
    this.#tasks = { records: new Records(join(state, "tasks")), runs: new Map() };
    for (const id of this.#services.records.ids()) this.#service(id);
  }

  /** Executions that run count as use of the environment. */
  get isAtWork(): boolean {
    return [...this.#executions.machines.values()].some((each) => each.isRunning);
  }

  /** Services and tasks that are at work in the dev container. */
  get inDevContainer(): number {
    const machines = [...this.#services.machines.values(), ...this.#tasks.runs.values()];
    return machines.filter((each) => each.isInDevContainer).length;
  }

  /** The environment is up: what has waited for that may begin. */
  setReady(isReady: boolean): void {
    if (this.#isReady === isReady) return;
    this.#isReady = isReady;
    for (const machine of [...this.#services.machines.values(), ...this.#executions.machines.values()]) machine.wake();
  }

  /** Everything there is; what is not among it is gone. */
  sync(services: readonly ServiceWish[], executions: readonly ExecutionWish[]): void {
    const named = new Set([
      ...services.map(({ service }) => service.id),
      ...executions.map((each) => each.execution.id),
    ]);
    for (const id of [...this.#services.machines.keys(), ...this.#executions.machines.keys()]) {
      if (!named.has(id)) this.remove(id);
    }
    for (const id of this.#executions.records.ids()) if (!named.has(id)) this.#forgetExecution(id);
    for (const wish of services) this.wantService(wish);
    for (const wish of executions) this.wantExecution(wish);
    this.#forgetTasks();
  }

  wantService(wish: ServiceWish): void {
    if (!this.#isClosing) this.#service(wish.service.id).want(wish);
  }

  wantExecution(wish: ExecutionWish): void {
    if (this.#isClosing) return;
    const { id, status } = wish.execution;
    const known = this.#executions.machines.get(id);
    known?.want(wish);
    if (known || (status && ENDED.has(status.phase))) return;
    this.#dropEnded();
    const machine = new ExecutionMachine(wish, this.#around, this.#executions.records, this, {
      isReady: ({ startedBy }) => this.#isReady || startedBy === EARLY,
      tell: (told, { startedAt, completedAt }) =>
        this.#tell({ kind: "execution", id, status: told, startedAt, completedAt }),
    });
    this.#executions.machines.set(id, machine);
  }

  /** A service is killed without its stop command; an execution is stopped. */
  remove(id: string): void {
    const service = this.#services.machines.get(id);
    const execution = this.#executions.machines.get(id);
    this.#services.machines.delete(id);
    if (service) {
      void service
        .remove()
        .then(() => rmSync(join(this.#around.logs, "services", id), { recursive: true, force: true }));
    }
    if (execution) void execution.close().then(() => this.#forgetExecution(id));
  }

  /** Says once more how everything is, for somebody who has heard nothing yet. */
  tellAll(): void {
    for (const [id, machine] of this.#services.machines) {
      const status = machine.status;
      if (status) this.#tell({ kind: "service", id, status });
    }
    for (const machine of this.#executions.machines.values()) machine.emit();
  }

  /** Stops everything, services by their own rules and all at the same time; resolves when it has ended. */
  async close(): Promise<void> {
    this.#isClosing = true;
    const machines = [...this.#services.machines.values(), ...this.#executions.machines.values()];
    await Promise.all(machines.map((machine) => machine.close()));
  }

  /** Keeps logs for so many days, looking now and then; ends with the process. */
  keepLogs(days: () => number): void {
    const prune = () => pruneLogs(this.#around.logs, days());
    prune();
    setInterval(prune, PRUNE_MS).unref();
  }

  /** Runs that have, or wait for, a container. */
  containerRuns(): string[] {
    const folder = join(this.#around.state, "runs");
    return readdirSync(folder).filter((name) => existsSync(join(folder, name, CONTAINER_FILE)));
  }

  service(id: string): ServiceMachine | undefined {
    return this.#services.machines.get(id);
  }

  taskRun(step: TaskExecutionSpec_Step, { firingId, execution, startedBy }: ExecutionWish): TaskRun {
    const task = step.step.case === "task" ? step.step.value : undefined;
    if (!task) throw new Error("a step without a task has no run");
    const key = keyOf(runOf(firingId, step));
    const known = this.#tasks.runs.get(key);
    if (known) return known;
    const reference = step.label;
    const started = { reference, executionId: execution.id, task, startedBy };
    const run = new TaskRun(key, started, this.#around, this.#tasks.records);
    this.#tasks.runs.set(key, run);
    return run;
  }

  #service(id: string): ServiceMachine {
    const known = this.#services.machines.get(id);
    if (known) return known;
    const machine = new ServiceMachine(id, this.#around, this.#services.records, {
      isReady: ({ startedBy }) => this.#isReady || startedBy === EARLY,
      tell: (status: ServiceStatus) => this.#tell({ kind: "service", id, status }),
    });
    this.#services.machines.set(id, machine);
    return machine;
  }

  #forgetExecution(id: string): void {
    this.#executions.machines.delete(id);
    this.#executions.records.remove(id);
    this.#forgetTasks();
  }

  /** What has ended longest ago has been told long since. */
  #dropEnded(): void {
    const ended = [...this.#executions.machines.values()].filter((machine) => machine.hasEnded);
    for (const { id } of ended.slice(0, Math.max(0, ended.length - ENDED_KEPT))) this.#forgetExecution(id);
  }

  /** Runs that no execution can ask for any more: all that there are have been named. */
  #forgetTasks(): void {
    if (this.#executions.machines.size > 0) return;
    for (const key of this.#tasks.records.ids()) this.#tasks.records.remove(key);
    this.#tasks.runs.clear();
  }
}
