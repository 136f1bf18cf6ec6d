import type { IncomingMessage, ServerResponse } from "node:http";
import { fromJson, type JsonValue, toJson } from "@bufbuild/protobuf";
import {
  ServiceSchema,
  ServiceStatusSchema,
  TaskExecutionSchema,
  TaskExecutionStatusSchema,
} from "../../../../gen/gitpod/v1/environment_automation_pb.js";
import type { AutomationEngine } from "./engine.ts";
import type { ExecutionWish } from "./execution.ts";
import { CommandProblem, type News } from "./parts.ts";
import type { ServiceWish } from "./service.ts";

// The conversation between a runner and the supervisor of one environment about services and executions: lines of JSON
// in both directions on one connection, which the runner opens. Whoever connects anew hears everything again.

/** What a runner says. */
export type ToSupervisor =
  | { type: "facts"; logBase: string; runnerName: string; logDays: number; isReady: boolean }
  | { type: "begin" }
  | { type: "service"; service: JsonValue; startedBy: string }
  | { type: "execution"; execution: JsonValue; firingId: string; startedBy: string }
  /** Everything since `begin` is all that there is. */
  | { type: "end" }
  | { type: "remove"; id: string }
  | { type: "secrets"; ask: number; values?: Record<string, string> };

/** What a supervisor says. */
export type ToRunner =
  | { type: "service"; id: string; status: JsonValue }
  | { type: "execution"; id: string; status: JsonValue; startedAt?: number; completedAt?: number }
  | { type: "secrets"; ask: number; ids: string[] };

const SECRETS_MS = 60_000;
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

interface Ask {
  ids: readonly string[];
  answer(values: ReadonlyMap<string, string> | undefined): void;
}

/** The supervisor's end. */
export class AutomationLink {
  readonly #asks = new Map<number, Ask>();
  #engine: AutomationEngine | undefined;
  #response: ServerResponse | undefined;
  #number = 0;
  #facts = { logBase: "", runnerName: "", logDays: 30 };

  /** What the runner has said about itself. */
  get facts(): { logBase: string; runnerName: string; logDays: number } {
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
  secrets(ids: readonly string[]): Promise<ReadonlyMap<string, string>> {
    const ask = ++this.#number;
    return new Promise((resolve, reject) => {
      const late = () => {
        this.#asks.delete(ask);
        reject(new CommandProblem("the values of secrets cannot be had at the moment"));
      };
      const timer = setTimeout(late, SECRETS_MS);
      const answer = (values: ReadonlyMap<string, string> | undefined) => {
        clearTimeout(timer);
        this.#asks.delete(ask);
        if (values) resolve(values);
        else late();
      };
      this.#asks.set(ask, { ids, answer });
      this.#send({ type: "secrets", ask, ids: [...ids] });
    });
  }

  /** A runner connects; one that was there before has been replaced. */
  async serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    this.#response?.destroy();
    this.#response = response;
    response.writeHead(200, { "content-type": "application/x-ndjson" });
    response.flushHeaders();
    for (const [ask, { ids }] of this.#asks) this.#send({ type: "secrets", ask, ids: [...ids] });
    this.#engine?.tellAll();
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
    response.end();
  }

  #hear(message: ToSupervisor): void {
    switch (message.type) {
      case "facts": {
        const { logBase, runnerName, logDays } = message;
        this.#facts = { logBase, runnerName, logDays };
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
      case "secrets": {
        const { values } = message;
        this.#asks.get(message.ask)?.answer(values && new Map(Object.entries(values)));
      }
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
