import { ExitCode, Failure } from "../exit.ts";
import { printable } from "../output.ts";
import type { AutomationsCommand } from "./command.ts";
import { findExecution, findService, findTask, referenceOf, unknown } from "./find.ts";

export const startCommand: AutomationsCommand = {
  name: "start",
  usage: "SERVICE",
  about: "start a service, without waiting for it; one that runs goes on",
  operands: 1,
  options: {},
  async run(place, { operands: [name = ""], terminal }) {
    const service = await findService(place, name);
    if (!service) throw await unknown(place, "service", name);
    await place.client.environmentAutomation.startService({ id: service.id });
    terminal.tell(`Service ${printable(referenceOf(service))} is asked to start.`);
    return ExitCode.CLEAN;
  },
};

export const stopCommand: AutomationsCommand = {
  name: "stop",
  usage: "SERVICE|EXECUTION",
  about: "stop a service, or an execution of a task by its id, without waiting for it",
  operands: 1,
  options: {},
  async run(place, { operands: [name = ""], terminal }) {
    const service = await findService(place, name);
    if (service) {
      await place.client.environmentAutomation.stopService({ id: service.id });
      terminal.tell(`Service ${printable(referenceOf(service))} is asked to stop.`);
      return ExitCode.CLEAN;
    }
    const execution = await findExecution(place, name);
    if (!execution) {
      if (!(await findTask(place, name))) throw await unknown(place, "service or execution", name);
      throw new Failure(
        `${printable(name)} is a task: give the id of an execution, which berth automations list shows`,
      );
    }
    await place.client.environmentAutomation.stopTaskExecution({ id: execution.id });
    terminal.tell(`Execution ${execution.id} is asked to stop.`);
    return ExitCode.CLEAN;
  },
};
