import type { Supervisor } from "./machine-supervisor.ts";
import { unheard } from "./side-work.ts";
import type { SupervisorClient } from "./supervisor/client.ts";
import type { Namespaces } from "./supervisor/namespaces.ts";
import type { SupervisorState } from "./supervisor/private-http.ts";
import { isAlive } from "./supervisor/processes.ts";

const HEALTH_INTERVAL_MS = 10_000;
const HEALTH_TIMEOUT_MS = 5_000;
const MISSED_CHECKS = 3;
/** How long a supervisor may be away before the machine counts as lost. */
const LOST_AFTER_MS = 30_000;
const RESTARTS = 3;
const RESTART_WINDOW_MS = 10 * 60_000;

/** Unplanned restarts are used up. */
export const LOST_TOO_OFTEN = `the machine was lost more than ${RESTARTS} times within ${RESTART_WINDOW_MS / 60_000} minutes`;

/** The restarts, as milliseconds since the epoch, that still count. */
export const recentRestarts = (restarts: readonly number[], now: number) =>
  restarts.filter((at) => now - at < RESTART_WINDOW_MS);

/** Whether there have been as many restarts as there may be. */
export const isWornOut = (restarts: readonly number[], now: number) => recentRestarts(restarts, now).length >= RESTARTS;

/** The supervisor that serves an environment at the moment, and whether it still does. */
export class Supervision {
  #supervisor: Supervisor | undefined;
  #checkedAt = 0;
  #missed = 0;
  #lostSince: number | undefined;
  #inside: Namespaces | undefined;
  #telling: Promise<void> | undefined;

  get client(): SupervisorClient | undefined {
    return this.#supervisor?.client;
  }

  /** What the environment's processes run in, also while there is no supervisor; undefined if the host as it is. */
  get inside(): Namespaces | undefined {
    return this.#inside;
  }

  /** What processes run in from now on. */
  enter(namespaces: Namespaces | undefined): void {
    if (namespaces === this.#inside) return;
    this.#inside?.close();
    this.#inside = namespaces;
  }

  use(supervisor: Supervisor): void {
    this.enter(supervisor.namespaces);
    this.#supervisor = supervisor;
    this.#checkedAt = Date.now();
    this.#missed = 0;
    this.#lostSince = undefined;
  }

  drop(): void {
    this.#supervisor = undefined;
  }

  /** Nothing of the environment runs any more, or it is for another runner process to look after. */
  leave(): void {
    this.drop();
    this.enter(undefined);
  }

  /** As `setWorkspaceFolder`, without waiting; `hasTold` does, and passes the error on. */
  tellWorkspaceFolder(folder: string): void {
    this.#telling = unheard(this.setWorkspaceFolder(folder));
  }

  /** What it was to be told has come to it. */
  async hasTold(): Promise<void> {
    const telling = this.#telling;
    this.#telling = undefined;
    await telling;
  }

  /** Tells it the folder that commands start in. One that cannot be told counts as gone, and the error is passed on. */
  async setWorkspaceFolder(folder: string): Promise<void> {
    try {
      await this.client?.setWorkspaceFolder(folder);
    } catch (error) {
      this.drop();
      throw error;
    }
  }

  /** It lives, and has answered lately; its state, when it was asked for, goes to `onState`. */
  async isPresent(onState: (state: SupervisorState) => void): Promise<boolean> {
    const supervisor = this.#supervisor;
    if (!supervisor || !isAlive(supervisor.process)) return false;
    if (Date.now() - this.#checkedAt < HEALTH_INTERVAL_MS) return true;
    const state = await supervisor.client.health(HEALTH_TIMEOUT_MS).catch(() => undefined);
    this.#missed = state ? 0 : this.#missed + 1;
    this.#checkedAt = Date.now();
    if (state) onState(state);
    return this.#missed < MISSED_CHECKS;
  }

  /** It is gone without having been asked. `isNews` the first time, `isLost` once it has been away for too long. */
  missed(): { isNews: boolean; isLost: boolean } {
    const now = Date.now();
    const isNews = this.#lostSince === undefined;
    this.#lostSince ??= now;
    this.drop();
    return { isNews, isLost: now - this.#lostSince >= LOST_AFTER_MS };
  }

  /** A new start: earlier absences are forgotten. */
  reset(): void {
    this.drop();
    this.#lostSince = undefined;
  }
}
