import { Code, ConnectError } from "@connectrpc/connect";
import {
  type Service,
  type Task,
  type TaskExecution,
  TaskExecutionPhase,
} from "../../../gen/gitpod/v1/environment_automation_pb.js";
import { Failure } from "../exit.ts";
import { printable } from "../output.ts";
import type { Place } from "./command.ts";

const PAGE_SIZE = 100;
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;

interface Page<T> {
  items: T[];
  pagination?: { nextToken: string } | undefined;
}

async function allPages<T>(read: (pagination: { pageSize: number; token: string }) => Promise<Page<T>>): Promise<T[]> {
  const found: T[] = [];
  for (let token = ""; ; ) {
    const { items, pagination } = await read({ pageSize: PAGE_SIZE, token });
    found.push(...items);
    token = pagination?.nextToken ?? "";
    if (!token) return found;
  }
}

type Filter<T> = Omit<T, "environmentIds">;

/** Services of the environment that pass a filter, by reference. */
export async function listServices(
  { client, environmentId }: Place,
  filter: Filter<{ references?: string[]; serviceIds?: string[] }> = {},
): Promise<Service[]> {
  const found = await allPages(async (pagination) => {
    const request = { filter: { ...filter, environmentIds: [environmentId] }, pagination };
    const { services: items, ...page } = await client.environmentAutomation.listServices(request);
    return { items, ...page };
  });
  return found.sort(byReference);
}

/** Tasks of the environment that pass a filter, by reference. */
export async function listTasks(
  { client, environmentId }: Place,
  filter: Filter<{ references?: string[]; taskIds?: string[] }> = {},
): Promise<Task[]> {
  const found = await allPages(async (pagination) => {
    const request = { filter: { ...filter, environmentIds: [environmentId] }, pagination };
    const { tasks: items, ...page } = await client.environmentAutomation.listTasks(request);
    return { items, ...page };
  });
  return found.sort(byReference);
}

/** Executions of the environment that have not ended, the newest first. */
export function listUnfinished({ client, environmentId }: Place): Promise<TaskExecution[]> {
  const filter = { environmentIds: [environmentId], phases: [TaskExecutionPhase.PENDING, TaskExecutionPhase.RUNNING] };
  return allPages(async (pagination) => {
    const { taskExecutions: items, ...page } = await client.environmentAutomation.listTaskExecutions({
      ...{ filter, pagination },
    });
    return { items, ...page };
  });
}

export const referenceOf = ({ metadata }: Service | Task) => metadata?.reference ?? "";

function byReference(left: Service | Task, right: Service | Task): number {
  return referenceOf(left) < referenceOf(right) ? -1 : 1;
}

/** An id names one thing for ever, so it comes before a reference that looks like one. */
export async function findService(place: Place, name: string): Promise<Service | undefined> {
  const byId = UUID.test(name) ? await listServices(place, { serviceIds: [name] }) : [];
  return byId[0] ?? (await listServices(place, { references: [name] }))[0];
}

export async function findTask(place: Place, name: string): Promise<Task | undefined> {
  const byId = UUID.test(name) ? await listTasks(place, { taskIds: [name] }) : [];
  return byId[0] ?? (await listTasks(place, { references: [name] }))[0];
}

export async function findExecution({ client, environmentId }: Place, id: string): Promise<TaskExecution | undefined> {
  if (!UUID.test(id)) return undefined;
  const answer = await client.environmentAutomation.getTaskExecution({ id }).catch((error: unknown) => {
    if (error instanceof ConnectError && error.code === Code.NotFound) return undefined;
    throw error;
  });
  return answer?.taskExecution?.metadata?.environmentId === environmentId ? answer.taskExecution : undefined;
}

/** The environment has nothing of that name; says so too if there is no such environment. */
export async function unknown({ client, environmentId }: Place, what: string, name: string): Promise<Failure> {
  await client.environments.getEnvironment({ environmentId });
  return new Failure(`the environment has no ${what} ${printable(name)}`);
}
