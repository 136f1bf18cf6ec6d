import { type Service, ServicePhase, type TaskExecution } from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { ExitCode, Failure } from "../exit.ts";
import { printable } from "../output.ts";
import { wholeNumber } from "../usage.ts";
import type { AutomationsCommand, Place } from "./command.ts";
import { findExecution, findService, findTask, unknown } from "./find.ts";
import { type LogOptions, readLog } from "./log.ts";
import { executionReader, hasEnded } from "./run.ts";
import { untilInterrupted, waitUntil } from "./wait.ts";

const MAX_TAIL = 100_000;

/** What has a log, and how it is now. */
interface Source<T> {
  read(): Promise<T>;
  /** Address of the log; undefined while one is still to come. */
  logUrl(now: T): string | undefined;
  step(now: T, wanted: string): string;
}

/** A start that has not been taken over leaves the log of the session before. */
const isStarting = ({ spec, status }: Service) =>
  spec?.desiredPhase === ServicePhase.RUNNING && spec.session !== status?.session;

function serviceLog({ client }: Place, id: string): Source<Service> {
  return {
    async read() {
      const { service } = await client.environmentAutomation.getService({ id });
      if (!service) throw new Failure(`the server does not tell about service ${id}`);
      return service;
    },
    logUrl: (service) => (isStarting(service) ? undefined : (service.status?.logUrl ?? "")),
    step: () => {
      throw new Failure("--step is for tasks: a service has one log");
    },
  };
}

/** Id of a step, which may also be named by its label. */
function stepOf({ spec }: TaskExecution, wanted: string): string {
  const steps = spec?.plan.flatMap((group) => group.steps) ?? [];
  const found = steps.find(({ id }) => id === wanted) ?? steps.find(({ label }) => label === wanted);
  if (!found) {
    const labels = steps.map(({ label }) => printable(label)).join(", ");
    throw new Failure(`there is no step ${printable(wanted)}; there are ${labels}`);
  }
  return found.id;
}

const executionLog = (place: Place, id: string): Source<TaskExecution> => ({
  read: executionReader(place, id),
  logUrl: (execution) => execution.status?.logUrl || (hasEnded(execution) ? "" : undefined),
  step: stepOf,
});

async function newestExecution({ client }: Place, taskId: string): Promise<string | undefined> {
  const request = { filter: { taskIds: [taskId] }, pagination: { pageSize: 1 } };
  return (await client.environmentAutomation.listTaskExecutions(request)).taskExecutions[0]?.id;
}

async function read<T>(place: Place, source: Source<T>, options: LogOptions, signal: AbortSignal) {
  const isThere = (now: T) => !options.follow || source.logUrl(now) !== undefined;
  const now = await waitUntil(source.read, isThere, signal);
  const url = source.logUrl(now);
  if (url === undefined) throw new Failure("there is no log yet: it has not begun");
  if (!url) throw new Failure("there is no log: it never ran");
  const step = options.step === undefined ? undefined : source.step(now, options.step);
  return readLog(place, url, { ...options, step }, signal);
}

/** The log that a name means: of a service, of the newest execution of a task, or of an execution. */
async function openNamed(place: Place, name: string, options: LogOptions, signal: AbortSignal) {
  const [service, task] = await Promise.all([findService(place, name), findTask(place, name)]);
  if (service && task) {
    throw new Failure(`${printable(name)} is a service and a task: give the id, which berth automations list shows`);
  }
  if (service) return await read(place, serviceLog(place, service.id), options, signal);
  const id = task ? await newestExecution(place, task.id) : (await findExecution(place, name))?.id;
  if (id) return await read(place, executionLog(place, id), options, signal);
  if (task) throw new Failure(`task ${printable(name)} has no log: it never ran`);
  throw await unknown(place, "service, task or execution", name);
}

export const logsCommand: AutomationsCommand = {
  name: "logs",
  usage: "SERVICE|TASK|EXECUTION [-f] [--tail N] [--step STEP] [--timestamps]",
  about: "print the log of a service or of the newest execution of a task; -f goes on until it ends or Ctrl-C",
  operands: 1,
  options: {
    follow: { type: "boolean", short: "f", default: false },
    tail: { type: "string" },
    step: { type: "string" },
    timestamps: { type: "boolean", default: false },
  },
  async run(place, { operands: [name = ""], values, terminal }) {
    const text = (value: string | boolean | undefined) => (typeof value === "string" ? value : undefined);
    const tail = text(values.tail);
    if (tail !== undefined) wholeNumber("tail", tail, 0, MAX_TAIL);
    const options = {
      ...{ follow: values.follow === true, timestamps: values.timestamps === true, tail },
      step: text(values.step),
    };
    return await untilInterrupted(terminal, async (signal) => {
      await terminal.pour(await openNamed(place, name, options, signal));
      return ExitCode.CLEAN;
    });
  },
};
