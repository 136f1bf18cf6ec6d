import { CommandProblem } from "./parts.ts";
import type { ToRunner, ToSupervisor } from "./talk.ts";

type Answer = Extract<ToSupervisor, { ask: number }>;
type AnswerOf<T extends Answer["type"]> = Extract<Answer, { type: T }>;

interface AskOptions {
  /** Failure message when nobody answers. */
  problem: string;
  /** Longest wait for the answer of a runner that is there. */
  withinMs?: number;
  /** Takes back what was asked. */
  signal?: AbortSignal;
  onOutput?: (text: string) => void;
}

interface Open {
  message: ToRunner;
  hear(answer: Answer): void;
}

/** How long a runner may be away. */
const PATIENCE_MS = 60_000;

/** Questions to a runner, which one that connects later hears again; each has an end. */
export class Asks {
  readonly #send: (message: ToRunner) => void;
  readonly #open = new Map<number, Open>();
  #number = 0;
  #isConnected = false;

  constructor(send: (message: ToRunner) => void) {
    this.#send = send;
  }

  /** Resolves with the answer of that type; rejects with a CommandProblem when none comes in time. */
  async ask<T extends Answer["type"]>(
    type: T,
    messageFor: (ask: number) => ToRunner,
    { problem, withinMs = PATIENCE_MS, signal, onOutput }: AskOptions,
  ): Promise<AnswerOf<T>> {
    signal?.throwIfAborted();
    const ask = ++this.#number;
    const message = messageFor(ask);
    const { promise, resolve, reject } = Promise.withResolvers<AnswerOf<T>>();
    const until = Date.now() + withinMs;
    const isLate = () => Date.now() >= until || !this.#isConnected;
    const look = setInterval(() => isLate() && reject(new CommandProblem(problem)), Math.min(PATIENCE_MS, withinMs));
    const onAbort = () => reject(new CommandProblem("it is not wanted any more"));
    signal?.addEventListener("abort", onAbort, { once: true });
    this.#open.set(ask, {
      message,
      hear(answer) {
        if (answer.type === "container-output") onOutput?.(answer.text);
        else if (answer.type === type) resolve(answer as AnswerOf<T>);
      },
    });
    this.#send(message);
    try {
      return await promise;
    } finally {
      clearInterval(look);
      signal?.removeEventListener("abort", onAbort);
      this.#open.delete(ask);
    }
  }

  hear(answer: Answer): void {
    this.#open.get(answer.ask)?.hear(answer);
  }

  /** A runner is there and hears everything that nobody has answered. */
  connected(): void {
    this.#isConnected = true;
    for (const { message } of this.#open.values()) this.#send(message);
  }

  disconnected(): void {
    this.#isConnected = false;
  }
}
