import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { environmentPaths } from "../src/runner/paths.ts";
import { readRecord } from "../src/runner/record.ts";
import { killEnvironmentProcesses } from "../src/runner/supervisor/processes.ts";
import { removeUser } from "../src/runner/users.ts";

/** Ends what runners of a test have left behind, and removes the users they made. */
export class Cleaner {
  readonly #dataDir: string;

  constructor(dataDir: string) {
    this.#dataDir = dataDir;
  }

  async run(): Promise<void> {
    for (const part of ["environments", "quarantine", "trash"]) {
      for (const name of await readdir(join(this.#dataDir, part)).catch(() => [])) {
        const root = join(this.#dataDir, part, name);
        const id = name.split(".")[0] ?? "";
        const record = await readRecord({ ...environmentPaths(this.#dataDir, id), root, record: join(root, "state.json") });
        const uid = record?.user?.own ? record.user.uid : undefined;
        await killEnvironmentProcesses({ environmentId: id, uid });
        await removeUser(id, record?.user);
      }
    }
  }
}
