import { createHash } from "node:crypto";
import { crc32 } from "node:zlib";
import type { FieldProblem } from "./errors.ts";

/** Kinds of opaque tokens; the numbers are stored. */
export const TokenKind = {
  PERSONAL_ACCESS: 1,
  SERVICE_ACCOUNT: 2,
  SERVICE_ACCOUNT_ACCESS: 3,
  RUNNER_EXCHANGE: 4,
  RUNNER_ACCESS: 5,
  ENVIRONMENT: 6,
  ENVIRONMENT_ACCESS: 7,
  PORT_ACCESS: 8,
  LOGS: 9,
  SCIM: 10,
  /** A browser that is signed in; comes as a cookie, never as a bearer token. */
  SESSION: 11,
} as const;
export type TokenKind = (typeof TokenKind)[keyof typeof TokenKind];

const PREFIXES: Record<TokenKind, string> = {
  [TokenKind.PERSONAL_ACCESS]: "berth_pat_",
  [TokenKind.SERVICE_ACCOUNT]: "berth_sat_",
  [TokenKind.SERVICE_ACCOUNT_ACCESS]: "berth_saa_",
  [TokenKind.RUNNER_EXCHANGE]: "berth_rxt_",
  [TokenKind.RUNNER_ACCESS]: "berth_rat_",
  [TokenKind.ENVIRONMENT]: "berth_env_",
  [TokenKind.ENVIRONMENT_ACCESS]: "berth_eat_",
  [TokenKind.PORT_ACCESS]: "berth_prt_",
  [TokenKind.LOGS]: "berth_log_",
  [TokenKind.SCIM]: "berth_scim_",
  [TokenKind.SESSION]: "berth_ses_",
};
const KIND_BY_PREFIX = new Map(Object.entries(PREFIXES).map(([kind, prefix]) => [prefix, Number(kind) as TokenKind]));

const DAY_MS = 24 * 60 * 60_000;
/** Lifetimes that nobody asked for otherwise, in milliseconds. */
export const PERSONAL_ACCESS_MS = 30 * DAY_MS;
export const SERVICE_ACCOUNT_MS = 90 * DAY_MS;
/** Tokens for the endpoints of runners. */
export const RUNNER_ACCESS_MS = 60 * 60_000;
/** A port token that stands in an address, until it is exchanged: browsers come with it at once. */
export const REDEEM_MS = 60_000;
/** Lifetime of a token that lets a person act as a service account. */
export const SERVICE_ACCOUNT_ACCESS_MS = 30 * 60_000;
/** How long the list of somebody's tokens shows one after its end. */
export const SHOWN_AFTER_END_MS = 30 * DAY_MS;

const DESCRIPTION_LENGTH = 255;

/** What is wrong with the description of a token; none at all is fine. */
export const descriptionProblems = (description: string): FieldProblem[] =>
  [...description].length <= DESCRIPTION_LENGTH
    ? []
    : [{ field: "description", message: `must have at most ${DESCRIPTION_LENGTH} characters` }];

const BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const SECRET_BYTES = 32;
const SECRET_LENGTH = 43;
const CHECKSUM_LENGTH = 6;
const FORM = /^(berth_[a-z]{3,4}_)([0-9A-Za-z]{43})([0-9A-Za-z]{6})$/;

function base62(value: bigint, length: number): string {
  let text = "";
  for (let rest = value; text.length < length; rest /= 62n) text = BASE62[Number(rest % 62n)] + text;
  return text;
}

const checksum = (text: string) => base62(BigInt(crc32(text)), CHECKSUM_LENGTH);

/** Text of a new token: prefix, 43 characters from 32 random bytes, 6 characters of CRC-32. */
export function tokenText(kind: TokenKind, random: (bytes: number) => Uint8Array): string {
  const secret = BigInt(`0x${Buffer.from(random(SECRET_BYTES)).toString("hex")}`);
  const body = PREFIXES[kind] + base62(secret, SECRET_LENGTH);
  return body + checksum(body);
}

/** The kind that a text claims to be, or undefined when its form or checksum is wrong: no lookup is needed then. */
export function tokenKind(text: string): TokenKind | undefined {
  const match = FORM.exec(text);
  const kind = KIND_BY_PREFIX.get(match?.[1] ?? "");
  return kind && checksum(text.slice(0, -CHECKSUM_LENGTH)) === match?.[3] ? kind : undefined;
}

/** What the database keeps instead of the text. */
export function tokenHash(text: string): Uint8Array {
  return createHash("sha256").update(text).digest();
}
