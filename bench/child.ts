import { fork } from "node:child_process";
import { fileURLToPath } from "node:url";
import type { BaseApi, Reply, Request } from "./children/serve.ts";

const READY_MS = 60_000;
const CALL_MS = 60_000;
const STOP_MS = 15_000;

/** What a child process offers: functions by name. Arguments and results are structured clones. */
type Api<T> = { [Name in keyof T]: (...args: never[]) => unknown };

/** A process of its own, so that its CPU time and memory can be told from everything else. */
export interface Child<T extends Api<T>> {
  readonly pid: number;
  call<Name extends keyof (T & BaseApi) & string>(
    name: Name,
    ...args: Parameters<(T & BaseApi)[Name]>
  ): Promise<Awaited<ReturnType<(T & BaseApi)[Name]>>>;
  /** Asks it to end, and makes it end if it does not. */
  stop(): Promise<void>;
}

function within<T>(promise: Promise<T>, ms: number, what: string): Promise<T> {
  const late = Promise.withResolvers<never>();
  const timer = setTimeout(() => late.reject(new Error(`${what} took longer than ${ms} ms`)), ms);
  return Promise.race([promise, late.promise]).finally(() => clearTimeout(timer));
}

/** Starts `children/<script>` and resolves once it serves. */
export async function startChild<T extends Api<T>>(script: string, settings: object): Promise<Child<T>> {
  const path = fileURLToPath(new URL(`children/${script}`, import.meta.url));
  const child = fork(path, { serialization: "advanced", stdio: ["ignore", "ignore", "inherit", "ipc"] });
  const waiting = new Map<number, PromiseWithResolvers<unknown>>();
  const ended = Promise.withResolvers<void>();
  const end = () => {
    for (const { reject } of waiting.values()) reject(new Error(`${script} ended`));
    waiting.clear();
    ended.resolve();
  };
  child.once("exit", end);
  child.once("error", end);
  let last = 0;
  const send = (request: Omit<Request, "id">) => {
    last += 1;
    const answer = Promise.withResolvers<unknown>();
    waiting.set(last, answer);
    child.send({ ...request, id: last }, (error) => {
      if (error) answer.reject(new Error(`${script} ended`));
    });
    return answer.promise;
  };
  child.on("message", ({ id, result, error }: Reply) => {
    const answer = waiting.get(id);
    waiting.delete(id);
    if (error === undefined) answer?.resolve(result);
    else answer?.reject(new Error(`${script}: ${error}`));
  });
  const stop = async () => {
    if (child.exitCode !== null || child.signalCode !== null) return;
    const timer = setTimeout(() => child.kill("SIGKILL"), STOP_MS);
    if (child.connected) child.disconnect();
    await ended.promise;
    clearTimeout(timer);
  };
  try {
    await within(send({ name: "start", args: [settings] }), READY_MS, `the start of ${script}`);
  } catch (error) {
    await stop();
    throw error;
  }
  return {
    pid: child.pid ?? 0,
    call: (name, ...args) => within(send({ name, args }), CALL_MS, `${name} of ${script}`) as never,
    stop,
  };
}
