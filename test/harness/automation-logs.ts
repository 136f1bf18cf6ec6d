import type { BerthClient } from "../../src/client.ts";

/** Reads logs of services and executions as clients do: with a logs token. */
export interface LogReader {
  /** The text until the log has ended. */
  read(url: string | undefined, query?: string): Promise<string>;
  status(url: string): Promise<number>;
}

export async function createEnvironmentLogs(client: BerthClient, environmentId: string): Promise<LogReader> {
  const { accessToken } = await client.environments.createEnvironmentLogsToken({ environmentId });
  const get = (url: string) => fetch(url, { headers: { authorization: `Bearer ${accessToken}` } });
  return {
    async read(url = "", query = "") {
      const response = await get(`${url}${query}`);
      if (response.status !== 200) throw new Error(`${response.status}: ${await response.text()}`);
      return await response.text();
    },
    status: async (url) => (await get(`${url}?follow=false`)).status,
  };
}
