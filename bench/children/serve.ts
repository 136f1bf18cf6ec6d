/** A message from the parent process. */
export interface Request {
  id: number;
  name: string;
  args: unknown[];
}

export interface Reply {
  id: number;
  result?: unknown;
  error?: string;
}

/** What every child process can be asked. */
export interface BaseApi {
  /** CPU time of this process so far, in microseconds. */
  cpuMicros(): number;
}

type Functions = Record<string, (...args: never[]) => unknown>;

const base: BaseApi = {
  cpuMicros() {
    const { user, system } = process.cpuUsage();
    return user + system;
  },
};

/**
 * Answers the parent process: its first message brings the settings and starts what is offered, the others call it. The
 * process ends, in order, when the parent lets go of it.
 */
export function serve<Settings, T extends object>(
  start: (settings: Settings) => Promise<{ api: T; stop?: () => Promise<void> }>,
): void {
  let api: Functions = {};
  let stop: () => Promise<void> = async () => undefined;
  const run = async ({ name, args }: Request): Promise<unknown> => {
    if (name !== "start") return api[name]?.(...(args as never[]));
    const started = await start(args[0] as Settings);
    api = { ...base, ...started.api } as unknown as Functions;
    stop = started.stop ?? stop;
    return undefined;
  };
  process.on("message", (request: Request) => {
    const reply = (answer: Omit<Reply, "id">) => {
      if (process.connected) process.send?.({ id: request.id, ...answer });
    };
    run(request).then(
      (result) => reply({ result }),
      (error: unknown) => reply({ error: error instanceof Error ? (error.stack ?? error.message) : String(error) }),
    );
  });
  process.on("disconnect", () => {
    stop().finally(() => process.exit(0));
  });
  // Ctrl-C reaches the whole group; the parent decides when a child ends.
  process.on("SIGINT", () => undefined);
}
