/** Where activity comes from, as `EnvironmentActivitySignal.source` names it. */
export type ActivitySource = "Ops API" | "Terminal" | "Automations";

export interface LastActivity {
  source: ActivitySource;
  at: Date;
}

/** Remembers the latest sign of use; work that is still running counts as use right now. */
export class ActivityTracker {
  #last: LastActivity | undefined;
  readonly #running = new Map<ActivitySource, number>();

  /** The hook handlers call for everything that counts as activity. */
  readonly onActivity = (source: ActivitySource): void => {
    this.#last = { source, at: new Date() };
  };

  /** Keeps the source active until `work` settles. */
  async during<T>(source: ActivitySource, work: Promise<T>): Promise<T> {
    this.#count(source, 1);
    try {
      return await work;
    } finally {
      this.#count(source, -1);
      this.onActivity(source);
    }
  }

  last(): LastActivity | undefined {
    for (const [source, count] of this.#running) if (count > 0) return { source, at: new Date() };
    return this.#last;
  }

  #count(source: ActivitySource, change: number): void {
    this.#running.set(source, (this.#running.get(source) ?? 0) + change);
  }
}
