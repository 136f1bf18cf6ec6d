import { exportJWK, exportPKCS8, generateKeyPair, importPKCS8, type JSONWebKeySet, SignJWT } from "jose";
import type { App } from "./app.ts";
import { currentKey, isRetired, nextKeyAt } from "./domain/signing-keys.ts";
import { seal, unseal } from "./store/envelope.ts";
import {
  deleteSigningKeys,
  insertSigningKey,
  listSigningKeys,
  lockSigningKeys,
  type SigningKey,
  signingKeyContext,
} from "./store/signing-keys.ts";

const ALGORITHM = "RS256";
const MODULUS_BITS = 2048;
const TOKEN_S = 60 * 60;
const JTI_BYTES = 16;
// Far below the time that a key is published before its first use, and kept after its last.
const KEEP_MS = 60_000;

/** Signs what the installation says about its principals, and tells others how to check it. */
export interface Signer {
  /** A JWT with these claims and the usual ones, valid for an hour. */
  sign(payload: { sub: string; aud: string[]; claims: Record<string, unknown> }): Promise<string>;
  /** Public keys of all tokens that are valid now or soon. */
  publicKeys(): Promise<JSONWebKeySet>;
}

/** Makes a key pair for a time that has come, and forgets those past use. True if it changed anything. */
export async function rotateSigningKeys(app: App): Promise<boolean> {
  const now = app.now();
  const isDue = (keys: readonly SigningKey[]) => nextKeyAt(keys, now) !== undefined;
  const known = await listSigningKeys(app.db.list);
  // Generating one takes long: not under the lock, where all others would wait.
  const made = isDue(known) ? await generateKey(app, now) : undefined;
  if (!made && !known.some((_, index) => isRetired(known, index, now))) return false;
  await app.db.begin(async (tx) => {
    const keys = await lockSigningKeys(tx);
    const activeAt = nextKeyAt(keys, now);
    if (made && activeAt) await insertSigningKey(tx, { ...made, activeAt }, now);
    const retired = keys.filter((_, index) => isRetired(keys, index, now));
    await deleteSigningKeys(
      tx,
      retired.map(({ id }) => id),
    );
  });
  return true;
}

async function generateKey(app: App, activeAt: Date): Promise<SigningKey> {
  const id = app.newId();
  const { publicKey, privateKey } = await generateKeyPair(ALGORITHM, {
    modulusLength: MODULUS_BITS,
    extractable: true,
  });
  const publicJwk = { ...(await exportJWK(publicKey)), kid: id, alg: ALGORITHM, use: "sig" };
  const pem = Buffer.from(await exportPKCS8(privateKey));
  const sealedPrivateKey = seal(app.masterKey, signingKeyContext(id), pem, app.random);
  return { id, publicJwk: JSON.stringify(publicJwk), sealedPrivateKey, activeAt };
}

/** The keys of the installation, looked up at most once a minute. */
export function createSigner(app: App): Signer {
  let kept: { keys: SigningKey[]; until: number } | undefined;
  const imported = new Map<string, ReturnType<typeof importPKCS8>>();

  async function keys(): Promise<SigningKey[]> {
    const now = app.now().getTime();
    if (kept && now < kept.until) return kept.keys;
    let found = await listSigningKeys(app.db.point);
    if (!currentKey(found, app.now())) {
      await rotateSigningKeys(app);
      found = await listSigningKeys(app.db.point);
    }
    kept = { keys: found, until: now + KEEP_MS };
    for (const id of imported.keys()) if (!found.some((key) => key.id === id)) imported.delete(id);
    return found;
  }

  function privateKey({ id, sealedPrivateKey }: SigningKey) {
    const known = imported.get(id);
    if (known) return known;
    const pem = Buffer.from(unseal(app.masterKey, signingKeyContext(id), sealedPrivateKey)).toString();
    const key = importPKCS8(pem, ALGORITHM);
    imported.set(id, key);
    return key;
  }

  return {
    async sign({ sub, aud, claims }) {
      const key = currentKey(await keys(), app.now());
      if (!key) throw new Error("there is no signing key");
      const iat = Math.floor(app.now().getTime() / 1000);
      const jti = Buffer.from(app.random(JTI_BYTES)).toString("base64url");
      return new SignJWT({ ...claims, iss: app.config.publicUrl, sub, aud, iat, exp: iat + TOKEN_S, jti })
        .setProtectedHeader({ alg: ALGORITHM, kid: key.id, typ: "JWT" })
        .sign(await privateKey(key));
    },
    async publicKeys() {
      const all = await keys();
      const now = app.now();
      return { keys: all.filter((_, index) => !isRetired(all, index, now)).map((key) => JSON.parse(key.publicJwk)) };
    },
  };
}
