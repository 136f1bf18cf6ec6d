import { openDb } from "../../src/store/db.ts";
import { serve } from "./serve.ts";

export interface PointReadsSettings {
  databaseUrl: string;
  environmentId: string;
}

export interface Reads {
  perSecond: number;
  /** CPU time of each, in microseconds. */
  cpuUs: number;
}

export interface PointReadsApi {
  /** Reads the environment so often, `clients` at once, after `before` reads that are not counted. */
  read(options: { before: number; count: number; clients: number }): Promise<Reads>;
}

// Reads through the connections that the product uses for single rows.
serve<PointReadsSettings, PointReadsApi>(async ({ databaseUrl, environmentId }) => {
  const db = openDb(databaseUrl);
  const read: PointReadsApi["read"] = async ({ before, count, clients }) => {
    let [cpu, from, started] = [process.cpuUsage(), performance.now(), 0];
    const client = async () => {
      while (started < before + count) {
        if (started === before) [cpu, from] = [process.cpuUsage(), performance.now()];
        started += 1;
        await db.point`select metadata, spec, status from environments where id = ${environmentId}`;
      }
    };
    await Promise.all(Array.from({ length: clients }, client));
    const { user, system } = process.cpuUsage(cpu);
    return { perSecond: count / ((performance.now() - from) / 1000), cpuUs: (user + system) / count };
  };
  return { api: { read }, stop: () => db.close() };
});
