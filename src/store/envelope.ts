import { createCipheriv, createDecipheriv, createHmac } from "node:crypto";

// Sealed value: version (1) | nonce of the key (12) | wrapped data key (32 + 16) | nonce (12) | ciphertext | tag (16).
// Each value has its own data key, so that a new master key rewraps keys and never touches values.
const VERSION = 1;
const NONCE = 12;
const KEY = 32;
const TAG = 16;
const CIPHER = "aes-256-gcm";

type Random = (bytes: number) => Uint8Array;

function encrypt(key: Uint8Array, nonce: Uint8Array, context: string, plain: Uint8Array): Buffer {
  const cipher = createCipheriv(CIPHER, key, nonce, { authTagLength: TAG }).setAAD(Buffer.from(context));
  return Buffer.concat([cipher.update(plain), cipher.final(), cipher.getAuthTag()]);
}

function decrypt(key: Uint8Array, nonce: Uint8Array, context: string, sealed: Uint8Array): Buffer {
  const decipher = createDecipheriv(CIPHER, key, nonce, { authTagLength: TAG }).setAAD(Buffer.from(context));
  decipher.setAuthTag(sealed.subarray(sealed.length - TAG));
  return Buffer.concat([decipher.update(sealed.subarray(0, sealed.length - TAG)), decipher.final()]);
}

/** Encrypts a secret under a fresh data key; `context` (ids of its owner) must be the same when it is opened. */
export function seal(masterKey: Uint8Array, context: string, plain: Uint8Array, random: Random): Uint8Array {
  const dataKey = random(KEY);
  const [keyNonce, nonce] = [random(NONCE), random(NONCE)];
  const wrapped = encrypt(masterKey, keyNonce, context, dataKey);
  return Buffer.concat([Buffer.from([VERSION]), keyNonce, wrapped, nonce, encrypt(dataKey, nonce, context, plain)]);
}

/** Opens what `seal` made; throws if the key, the context or a single bit differs. */
export function unseal(masterKey: Uint8Array, context: string, sealed: Uint8Array): Uint8Array {
  if (sealed[0] !== VERSION) throw new Error("a sealed value of an unknown version");
  const wrappedAt = 1 + NONCE;
  const nonceAt = wrappedAt + KEY + TAG;
  const dataKey = decrypt(masterKey, sealed.subarray(1, wrappedAt), context, sealed.subarray(wrappedAt, nonceAt));
  return decrypt(dataKey, sealed.subarray(nonceAt, nonceAt + NONCE), context, sealed.subarray(nonceAt + NONCE));
}

/** What the database keeps of a master key, to refuse another one. */
export function masterKeyCheck(masterKey: Uint8Array): Uint8Array {
  return createHmac("sha256", masterKey).update("berth master key check").digest();
}
