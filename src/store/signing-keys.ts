import type { KeyTimes } from "../domain/signing-keys.ts";
import type { Sql, Tx } from "./db.ts";

const LOCK = 7_482_933;

/** A key pair that signs ID tokens. */
export interface SigningKey extends KeyTimes {
  id: string;
  /** As RFC 7517 writes it, in JSON. */
  publicJwk: string;
  /** PKCS #8 in PEM, sealed with the context of `signingKeyContext`. */
  sealedPrivateKey: Uint8Array;
}

/** What binds a sealed private key to its row. */
export const signingKeyContext = (id: string) => `signing key ${id}`;

/** All keys, in the order in which they come into use. */
export async function listSigningKeys(sql: Sql | Tx): Promise<SigningKey[]> {
  const rows = await sql<{ id: string; public_jwk: string; sealed_private_key: Uint8Array; active_at: Date }[]>`
    select id, public_jwk, sealed_private_key, active_at from signing_keys order by active_at, id`;
  return rows.map((row) => ({
    id: row.id,
    publicJwk: row.public_jwk,
    sealedPrivateKey: row.sealed_private_key,
    activeAt: row.active_at,
  }));
}

/** As `listSigningKeys`; whoever else wants to change them waits until the transaction ends. */
export async function lockSigningKeys(tx: Tx): Promise<SigningKey[]> {
  await tx`select pg_advisory_xact_lock(${LOCK})`;
  return listSigningKeys(tx);
}

export async function insertSigningKey(tx: Tx, key: SigningKey, at: Date): Promise<void> {
  await tx`insert into signing_keys (id, public_jwk, sealed_private_key, created_at, active_at)
    values (${key.id}, ${key.publicJwk}, ${key.sealedPrivateKey}, ${at}, ${key.activeAt})`;
}

export async function deleteSigningKeys(tx: Tx, ids: readonly string[]): Promise<void> {
  await tx`delete from signing_keys where id = any(${ids as string[]})`;
}
