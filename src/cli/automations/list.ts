import { toJson } from "@bufbuild/protobuf";
import {
  type AutomationTrigger,
  type Service,
  ServicePhase,
  ServiceSchema,
  type Task,
  type TaskExecution,
  TaskExecutionPhase,
  TaskExecutionSchema,
  TaskSchema,
} from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { ExitCode } from "../exit.ts";
import { printable } from "../output.ts";
import type { AutomationsCommand } from "./command.ts";
import { listServices, listTasks, listUnfinished, referenceOf } from "./find.ts";

const HEADER = ["KIND", "REFERENCE", "PHASE", "TRIGGERS", "NAME", "ID"];

/** Columns as wide as their widest entry, in one line for each row. */
export function table(rows: readonly (readonly string[])[]): string {
  const shown = rows.map((row) => row.map((text) => printable(text) || "-"));
  const widths = shown[0]?.map((_, column) => Math.max(...shown.map((row) => row[column]?.length ?? 0))) ?? [];
  return shown
    .map((row) =>
      row
        .map((text, column) => text.padEnd(widths[column] ?? 0))
        .join("  ")
        .trimEnd(),
    )
    .join("\n");
}

const triggersOf = (triggers: readonly AutomationTrigger[] = []) =>
  triggers.map(({ trigger }) => trigger.case ?? "").join(",");

const wordOf = (phase = "") => phase.toLowerCase();

interface Found {
  services: Service[];
  tasks: Task[];
  taskExecutions: TaskExecution[];
}

const inJson = ({ services, tasks, taskExecutions }: Found) =>
  JSON.stringify({
    services: services.map((each) => toJson(ServiceSchema, each)),
    tasks: tasks.map((each) => toJson(TaskSchema, each)),
    taskExecutions: taskExecutions.map((each) => toJson(TaskExecutionSchema, each)),
  });

function rowsOf({ services, tasks, taskExecutions }: Found): string[][] {
  const definition = (kind: string, phase: string, { id, metadata }: Service | Task) => [
    ...[kind, metadata?.reference ?? "", phase, triggersOf(metadata?.triggeredBy), metadata?.name ?? "", id],
  ];
  const references = new Map(tasks.map((task) => [task.id, referenceOf(task)]));
  return [
    ...services.map((each) => definition("service", wordOf(ServicePhase[each.status?.phase ?? 0]), each)),
    ...tasks.map((each) => definition("task", "", each)),
    ...taskExecutions.map(({ id, metadata, status }) => {
      const reference = references.get(metadata?.taskId ?? "") ?? "";
      return [
        "execution",
        reference,
        wordOf(TaskExecutionPhase[status?.phase ?? 0]),
        metadata?.startedBy ?? "",
        "",
        id,
      ];
    }),
  ];
}

export const listCommand: AutomationsCommand = {
  name: "list",
  usage: "[--json]",
  about: "services, tasks, and the executions that have not ended",
  operands: 0,
  options: { json: { type: "boolean", default: false } },
  async run(place, { values, terminal }) {
    const [services, tasks, taskExecutions] = await Promise.all([
      listServices(place),
      listTasks(place),
      listUnfinished(place),
    ]);
    const found = { services, tasks, taskExecutions };
    const rows = rowsOf(found);
    // Nothing is also the answer about an environment that one cannot see.
    if (rows.length === 0) await place.client.environments.getEnvironment({ environmentId: place.environmentId });
    if (values.json) terminal.say(inJson(found));
    else if (rows.length === 0) terminal.tell("The environment has no services and no tasks.");
    else terminal.say(table([HEADER, ...rows]));
    return ExitCode.CLEAN;
  },
};
