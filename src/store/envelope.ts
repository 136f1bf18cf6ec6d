import { createCipheriv, createDecipheriv, createHmac } from "node:crypto";
import { otherMasterKey } from "../domain/errors.ts";

// Sealed value: version (1) | id of the master key (8) | nonce of the key (12) | wrapped data key (32 + 16) |
// nonce (12) | ciphertext | tag (16). Each value has its own data key, so that a new master key rewraps keys and never
// touches values.
const VERSION = 2;
const KEY_ID = 8;
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

/** What the database keeps of a master key, to refuse another one. */
export function masterKeyCheck(masterKey: Uint8Array): Uint8Array {
  return createHmac("sha256", masterKey).update("berth master key check").digest();
}

/** What a sealed value says about the master key that opens it. */
export const masterKeyId = (masterKey: Uint8Array): Uint8Array => masterKeyCheck(masterKey).subarray(0, KEY_ID);

const KEY_NONCE_AT = 1 + KEY_ID;
const WRAPPED_AT = KEY_NONCE_AT + NONCE;
const NONCE_AT = WRAPPED_AT + KEY + TAG;
const CIPHERTEXT_AT = NONCE_AT + NONCE;

function wrap(masterKey: Uint8Array, context: string, dataKey: Uint8Array, random: Random): Buffer {
  const nonce = random(NONCE);
  const wrapped = encrypt(masterKey, nonce, context, dataKey);
  return Buffer.concat([Buffer.from([VERSION]), masterKeyId(masterKey), nonce, wrapped]);
}

function unwrap(masterKey: Uint8Array, context: string, sealed: Uint8Array): Buffer {
  if (sealed[0] !== VERSION) throw new Error("a sealed value of an unknown version");
  if (Buffer.compare(sealed.subarray(1, KEY_NONCE_AT), masterKeyId(masterKey)) !== 0) throw otherMasterKey();
  return decrypt(masterKey, sealed.subarray(KEY_NONCE_AT, WRAPPED_AT), context, sealed.subarray(WRAPPED_AT, NONCE_AT));
}

/** Encrypts a secret under a fresh data key; `context` (ids of its owner) must be the same when it is opened. */
export function seal(masterKey: Uint8Array, context: string, plain: Uint8Array, random: Random): Uint8Array {
  const dataKey = random(KEY);
  const nonce = random(NONCE);
  return Buffer.concat([wrap(masterKey, context, dataKey, random), nonce, encrypt(dataKey, nonce, context, plain)]);
}

/**
 * Opens what `seal` made; throws if the context or a single bit differs, and UNAVAILABLE for another key: then the
 * installation has got a new one.
 */
export function unseal(masterKey: Uint8Array, context: string, sealed: Uint8Array): Uint8Array {
  const dataKey = unwrap(masterKey, context, sealed);
  return decrypt(dataKey, sealed.subarray(NONCE_AT, CIPHERTEXT_AT), context, sealed.subarray(CIPHERTEXT_AT));
}

/** The same value under another master key. */
export function rewrap(
  from: Uint8Array,
  to: Uint8Array,
  context: string,
  sealed: Uint8Array,
  random: Random,
): Uint8Array {
  const dataKey = unwrap(from, context, sealed);
  return Buffer.concat([wrap(to, context, dataKey, random), sealed.subarray(NONCE_AT)]);
}
