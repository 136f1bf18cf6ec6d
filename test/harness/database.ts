import { chmod, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { TestProject } from "vitest/node";
import { openDb } from "../../src/store/db.ts";
import { startEmbeddedPostgres } from "../../src/store/embedded-postgres.ts";
import { migrate } from "../../src/store/migrate.ts";

const TEMPLATE = "berth_template";

declare module "vitest" {
  export interface ProvidedContext {
    /** URL of a cluster for this run; the database in it is only a place to say `create database` from. */
    postgresUrl: string;
  }
}

/** URL of another database in the same cluster. */
export function databaseUrl(url: string, name: string): string {
  const parsed = new URL(url);
  parsed.pathname = `/${name}`;
  return parsed.toString();
}

/** One Postgres for the whole run, with a migrated database that every test file clones. */
async function setup(project: TestProject): Promise<() => Promise<void>> {
  const home = await mkdtemp(join(tmpdir(), "berth-test-"));
  // The user that Postgres runs as must be able to pass.
  await chmod(home, 0o711);
  const server = await startEmbeddedPostgres(join(home, "pg"), () => undefined);
  const admin = openDb(server.url);
  await admin.write.unsafe(`create database ${TEMPLATE}`);
  const template = openDb(databaseUrl(server.url, TEMPLATE));
  await migrate(template);
  await template.close();
  await admin.close();
  project.provide("postgresUrl", server.url);
  return async () => {
    await server.stop();
    await rm(home, { recursive: true, force: true });
  };
}

export { setup };
