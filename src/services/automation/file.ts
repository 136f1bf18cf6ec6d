import type { ServiceImpl } from "@connectrpc/connect";
import type {
  EnvironmentAutomationService,
  UpsertAutomationsFileRequest,
} from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { type App, transact } from "../../app.ts";
import { fileProblems, type Upsert, upsert } from "../../domain/automation-upsert.ts";
import { refuseProblems } from "../../domain/errors.ts";
import type { Caller } from "../../domain/principal.ts";
import { principal } from "../../rpc/authenticate.ts";
import { insertService, saveService, serviceIn } from "../../store/automation/services.ts";
import { type AutomationSet, readAutomationSet } from "../../store/automation/start.ts";
import { insertTask, saveTask, taskIn } from "../../store/automation/tasks.ts";
import type { Tx } from "../../store/db.ts";
import { getEnvironment } from "../../store/environments.ts";
import type { Attribution } from "../../store/record.ts";
import { byCaller, checkEdit, checkSize, subjectOf } from "./environment.ts";

async function write(tx: Tx, set: AutomationSet, changes: Upsert, by: Attribution): Promise<void> {
  for (const { id, next } of changes.services) {
    const before = set.services.get(id);
    if (before) await saveService(tx, before, next, { ...by, action: "Service updated" });
    else await insertService(tx, serviceIn(set.environment, id, next), by);
  }
  for (const { id, before, next } of changes.tasks) {
    const task = taskIn(set.environment, id, next);
    if (before) await saveTask(tx, task, by);
    else await insertTask(tx, task, by);
  }
}

async function upsertFile(app: App, caller: Caller, request: UpsertAutomationsFileRequest) {
  const file = request.automationsFile;
  refuseProblems(fileProblems(file));
  return transact(app, async (tx, touched) => {
    const environment = await getEnvironment(tx, caller, request.environmentId, true);
    checkEdit(environment);
    const set = await readAutomationSet(tx, environment);
    const stored = { services: [...set.services.values()], tasks: [...set.tasks.values()] };
    const by = byCaller(app, caller);
    const changes = upsert(file!, stored, { creator: subjectOf(caller), now: by.at, newId: app.newId });
    await write(tx, set, changes, by);
    if (changes.services.length + changes.tasks.length > 0) await checkSize(tx, environment);
    if (changes.services.length > 0) touched(environment.metadata.runnerId);
    return { updatedServiceIds: changes.serviceIds, updatedTaskIds: changes.taskIds };
  });
}

/** Services and tasks as a file in the repository describes them. */
export function file(app: App) {
  return {
    upsertAutomationsFile: (request, context) => upsertFile(app, principal(context), request),
  } satisfies Partial<ServiceImpl<typeof EnvironmentAutomationService>>;
}
