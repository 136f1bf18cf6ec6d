import { randomBytes } from "node:crypto";
import { readFile, rename } from "node:fs/promises";
import { v7 as uuidv7 } from "uuid";
import { ConfigError, parseMasterKey, type ServerConfig } from "../../config.ts";
import { RefusedStart } from "../../domain/errors.ts";
import { keepMasterKey, masterKeyPath } from "../../installation.ts";
import { recordForAll } from "../../store/operator.ts";
import { rekey } from "../../store/rekey.ts";
import { tell } from "../output.ts";
import { readOptions, UsageError } from "../usage.ts";
import { type AdminCommand, onInstallation, operatorConfig } from "./operator.ts";

const OPTIONS = "[--new-key-file FILE]";

/** The key that a file holds; undefined if there is no such file. */
async function keyIn(path: string): Promise<Uint8Array | undefined> {
  const text = await readFile(path, "utf8").catch(() => undefined);
  if (text === undefined) return undefined;
  const key = parseMasterKey(text.trim());
  if (!key) throw new ConfigError(`${path} must hold 32 bytes in base64`);
  return key;
}

/** The old key and the new one, which is kept in a file by now, and what is left to do when values are sealed with it. */
interface Rotation {
  from: Uint8Array;
  to: Uint8Array;
  finish(): Promise<string>;
}

/** Where the operator keeps the key, it is the operator who brings the new one. */
async function ownKey(from: Uint8Array, file: string | undefined): Promise<Rotation> {
  if (!file) {
    throw new UsageError(
      "the master key is yours, and so is the new one: --new-key-file names a file with 32 bytes in base64, which `openssl rand -base64 32` makes",
    );
  }
  const to = await keyIn(file);
  if (!to) throw new UsageError("--new-key-file cannot be read");
  return { from, to, finish: async () => `Start every process with the key in ${file} from now on` };
}

/** A key that we made and keep beside the data: the new one waits beside it, also for the next try. */
async function keptKey(config: ServerConfig): Promise<Rotation> {
  const [path, next] = [masterKeyPath(config), `${masterKeyPath(config)}.next`];
  const from = await keyIn(path);
  if (!from) throw new RefusedStart(`there is no master key in ${config.dataDir}`);
  const to = await keepMasterKey(next);
  const finish = async () => {
    await rename(next, path);
    return `The new key is in ${path}; start the server again`;
  };
  return { from, to, finish };
}

export const rotateKeyCommand: AdminCommand = {
  name: "rotate-key",
  options: OPTIONS,
  about: "seal every secret with a new master key; may be interrupted and run again (also: rekey)",
  async run(args, env) {
    const values = readOptions(`berth admin rotate-key ${OPTIONS}`, args, { "new-key-file": { type: "string" } });
    const { config } = operatorConfig(env);
    const file = values["new-key-file"];
    if (file && !config.masterKey) {
      throw new UsageError("--new-key-file is for a master key of your own: BERTH_MASTER_KEY or BERTH_MASTER_KEY_FILE");
    }
    await onInstallation(env, async (db) => {
      const rotation = await (config.masterKey ? ownKey(config.masterKey, file) : keptKey(config));
      const count = await rekey(db, rotation, randomBytes);
      if (count > 0) await recordForAll(db, "Master key replaced", { newId: uuidv7, at: new Date() });
      tell(`${count} sealed values have the new master key. ${await rotation.finish()}`);
    });
  },
};
