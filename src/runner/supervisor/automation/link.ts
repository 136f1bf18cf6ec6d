import type { IncomingMessage, ServerResponse } from "node:http";
import { fromJson, toJson } from "@bufbuild/protobuf";
import {
  ServiceSchema,
  ServiceStatusSchema,
  TaskExecutionSchema,
  TaskExecutionStatusSchema,
} from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import { Asks } from "./asks.ts";
import type { AutomationEngine } from "./engine.ts";
import type { ExecutionWish } from "./execution.ts";
import { CommandProblem, type Containers, type News } from "./parts.ts";
import type { ServiceWish } from "./service.ts";
import type { ToRunner, ToSupervisor } from "./talk.ts";

const NO_RUNNER = "runs_on.docker needs the runner, which cannot be reached at the moment";
/** The runner gives up earlier, and says why. */
const CONTAINER_MS = 30 * 60_000;
const MAX_WISH_BYTES = 32 * 1024 * 1024;

/** Cuts a stream into lines; throws when one is too long. */
export async function* linesOf(stream: AsyncIterable<Buffer>, maxBytes: number): AsyncGenerator<string> {
  let rest: Buffer = Buffer.alloc(0);
  for await (const chunk of stream) {
    rest = rest.length > 0 ? Buffer.concat([rest, chunk]) : chunk;
    for (let end = rest.indexOf(10); end >= 0; end = rest.indexOf(10)) {
      yield rest.subarray(0, end).toString();
      rest = rest.subarray(end + 1);
    }
    if (rest.length > maxBytes) throw new Error("a line is too long");
  }
}

/** The supervisor's end. */
export class AutomationLink {
  readonly #asks = new Asks((message) => this.#send(message));
  #engine: AutomationEngine | undefined;
  #response: ServerResponse | undefined;
  #facts = { logBase: "", logDays: 30 };

  /** What the runner has said about itself. */
  get facts(): { logBase: string; logDays: number } {
    return this.#facts;
  }

  use(engine: AutomationEngine): void {
    this.#engine = engine;
  }

  tell(news: News): void {
    if (news.kind === "service") {
      this.#send({ type: "service", id: news.id, status: toJson(ServiceStatusSchema, news.status) });
      return;
    }
    const { id, startedAt, completedAt } = news;
    this.#send({
      ...{ type: "execution", id, status: toJson(TaskExecutionStatusSchema, news.status) },
      ...(startedAt !== undefined && { startedAt }),
      ...(completedAt !== undefined && { completedAt }),
    });
  }

  /** Asks the runner for values, as soon as there is one; those that the environment may not have are absent. */
  async secrets(ids: readonly string[]): Promise<ReadonlyMap<string, string>> {
    const problem = "the values of secrets cannot be had at the moment";
    const { values } = await this.#asks.ask("secrets", (ask) => ({ type: "secrets", ask, ids: [...ids] }), { problem });
    if (!values) throw new CommandProblem(problem);
    return new Map(Object.entries(values));
  }

  /** What the runner does about containers, as soon as there is one. */
  readonly containers: Containers = {
    start: async (run, image, { onOutput, signal }) => {
      const answer = await this.#asks.ask("container", (ask) => ({ type: "container-start", ask, run, image }), {
        ...{ problem: NO_RUNNER, withinMs: CONTAINER_MS, signal },
        onOutput: (text) => onOutput(Buffer.from(text)),
      });
      if (answer.problem) throw new CommandProblem(answer.problem);
      return answer;
    },
    exec: async (run, part, mark) => {
      const message = { type: "container-exec", run, part, mark } as const;
      const { pid, problem } = await this.#asks.ask("container", (ask) => ({ ...message, ask }), {
        problem: NO_RUNNER,
      });
      if (problem) throw new CommandProblem(problem);
      return pid;
    },
    remove: (run) => this.#send({ type: "container-remove", run }),
  };

  /** A runner connects; one that was there before has been replaced. */
  async serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    this.#response?.destroy();
    this.#response = response;
    response.writeHead(200, { "content-type": "application/x-ndjson" });
    response.flushHeaders();
    this.#send({ type: "containers", runs: this.#engine?.containerRuns() ?? [] });
    this.#asks.connected();
    this.#engine?.tellAll();
    try {
      await this.#read(request, response);
    } finally {
      if (this.#response === response) this.#asks.disconnected();
    }
    response.end();
  }

  /** Everything has been said: a conversation that stays open would only hold up the end. */
  close(): void {
    this.#response?.end();
    this.#response = undefined;
  }

  async #read(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const wishes: { services: ServiceWish[]; executions: ExecutionWish[] } = { services: [], executions: [] };
    let isBeginning = false;
    for await (const line of linesOf(request, MAX_WISH_BYTES)) {
      if (this.#response !== response) break;
      const message = JSON.parse(line) as ToSupervisor;
      if (message.type === "begin") isBeginning = true;
      else if (message.type === "end") {
        this.#engine?.sync(wishes.services.splice(0), wishes.executions.splice(0));
        isBeginning = false;
      } else if (isBeginning && message.type === "service") wishes.services.push(serviceWish(message));
      else if (isBeginning && message.type === "execution") wishes.executions.push(executionWish(message));
      else this.#hear(message);
    }
  }

  #hear(message: ToSupervisor): void {
    switch (message.type) {
      case "facts": {
        const { logBase, logDays } = message;
        this.#facts = { logBase, logDays };
        this.#engine?.setReady(message.isReady);
        return;
      }
      case "service":
        this.#engine?.wantService(serviceWish(message));
        return;
      case "execution":
        this.#engine?.wantExecution(executionWish(message));
        return;
      case "remove":
        this.#engine?.remove(message.id);
        return;
      case "secrets":
      case "container":
      case "container-output":
        this.#asks.hear(message);
    }
  }

  #send(message: ToRunner): void {
    this.#response?.write(`${JSON.stringify(message)}\n`);
  }
}

const serviceWish = ({ service, startedBy }: Extract<ToSupervisor, { type: "service" }>): ServiceWish => ({
  ...{ service: fromJson(ServiceSchema, service, { ignoreUnknownFields: true }), startedBy },
});

const executionWish = (message: Extract<ToSupervisor, { type: "execution" }>): ExecutionWish => ({
  execution: fromJson(TaskExecutionSchema, message.execution, { ignoreUnknownFields: true }),
  firingId: message.firingId,
  startedBy: message.startedBy,
});
