import { type TaskExecution, TaskExecutionPhase } from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { ExitCode, Failure } from "../exit.ts";
import { printable, type Terminal } from "../output.ts";
import type { AutomationsCommand, Place } from "./command.ts";
import { findTask, referenceOf, unknown } from "./find.ts";
import { readLog } from "./log.ts";
import { untilInterrupted, waitUntil } from "./wait.ts";

const { SUCCEEDED, FAILED, STOPPED } = TaskExecutionPhase;

export const hasEnded = ({ status }: TaskExecution) =>
  [SUCCEEDED, FAILED, STOPPED].some((phase) => phase === status?.phase);

export function executionReader({ client }: Place, id: string): () => Promise<TaskExecution> {
  return async () => {
    const { taskExecution } = await client.environmentAutomation.getTaskExecution({ id });
    if (!taskExecution) throw new Failure(`the server does not tell about execution ${id}`);
    return taskExecution;
  };
}

/** Shows the log of an execution and waits for its end. A log that cannot be read is no reason not to. */
async function follow(place: Place, id: string, terminal: Terminal, signal: AbortSignal): Promise<TaskExecution> {
  const read = executionReader(place, id);
  const begun = await waitUntil(read, (each) => hasEnded(each) || Boolean(each.status?.logUrl), signal);
  if (begun.status?.logUrl) {
    await terminal.pour(readLog(place, begun.status.logUrl, { follow: true }, signal)).catch((error: unknown) => {
      if (!(error instanceof Failure)) throw error;
      terminal.tell(`berth: ${error.message}; waiting for the end without it`);
    });
  }
  return await waitUntil(read, hasEnded, signal);
}

export const runCommand: AutomationsCommand = {
  name: "run",
  usage: "TASK [--detach]",
  about:
    "run a task, show its log and wait for its end; exits with 1 unless it succeeds. Detached: prints the execution",
  operands: 1,
  options: { detach: { type: "boolean", short: "d", default: false } },
  async run(place, { operands: [name = ""], values, terminal }) {
    const task = await findTask(place, name);
    if (!task) throw await unknown(place, "task", name);
    const { taskExecution } = await place.client.environmentAutomation.startTask({ id: task.id });
    const id = taskExecution?.id ?? "";
    if (values.detach) {
      terminal.say(id);
      return ExitCode.CLEAN;
    }
    const reference = printable(referenceOf(task));
    terminal.tell(`Task ${reference} runs as execution ${id}.`);
    const wait = async (signal: AbortSignal) => {
      const { status } = await follow(place, id, terminal, signal);
      if (status?.phase === SUCCEEDED) return ExitCode.CLEAN;
      const reason = printable(status?.failureMessage ?? "");
      terminal.tell(
        status?.phase === STOPPED ? `Task ${reference} was stopped.` : `Task ${reference} has failed: ${reason}`,
      );
      return ExitCode.FAILURE;
    };
    const farewell = `No longer waiting. The task goes on; berth automations stop ${id} ends it.`;
    return await untilInterrupted(terminal, wait, farewell);
  },
};
