import type { Caller } from "../../domain/principal.ts";
import type { Fragment, Tx } from "../db.ts";
import { lockEnvironment, readEnvironment, type StoredEnvironment } from "../environments.ts";
import { noSuchPart, type Part } from "./parts.ts";

const environmentOf = (tx: Tx, part: Part, id: string): Fragment =>
  tx`(select environment_id from ${tx(part)} where id = ${id})`;

/** The environment of a part, locked, if the caller may read it; NOT_FOUND about the part otherwise. */
export async function holdEnvironmentOf(tx: Tx, caller: Caller, part: Part, id: string): Promise<StoredEnvironment> {
  const found = await readEnvironment(tx, caller, environmentOf(tx, part, id), true);
  if (!found) throw noSuchPart(part, id);
  return found;
}

/** The environment of a part, locked, for the system's own work; undefined if there is none. */
export const lockEnvironmentOf = (tx: Tx, part: Part, id: string) => lockEnvironment(tx, environmentOf(tx, part, id));
