import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import type { ServerConfig } from "../config.ts";
import { firstSignal } from "./signals.ts";

/** A line of the result, which scripts read. */
export const say = (text: string): void => void process.stdout.write(`${text}\n`);

/** A line for people, beside the result. */
export const tell = (text: string): void => void process.stderr.write(`${text}\n`);

/** Writes a result until all is written, or nobody reads any more. */
export async function pour(source: AsyncIterable<string | Uint8Array>): Promise<void> {
  await pipeline(Readable.from(source), process.stdout, { end: false }).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== "EPIPE") throw error;
  });
}

/** Where a command reads and writes. */
export interface Terminal {
  say(text: string): void;
  tell(text: string): void;
  pour(source: AsyncIterable<string | Uint8Array>): Promise<void>;
  input: AsyncIterable<Uint8Array>;
  /** Resolves once somebody presses Ctrl-C, which ends nothing by itself from then on. */
  interrupted(): Promise<void>;
}

export const TERMINAL: Terminal = { say, tell, pour, input: process.stdin, interrupted: firstSignal };

/** Texts that somebody else wrote, on one line and without what steers a terminal or reorders what it shows. */
export const printable = (text: string): string =>
  text.replace(/[\p{Cc}\u2028\u2029]+/gu, " ").replace(/[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "");

/** Shows the admin token of a first start once, to whoever started the program. */
export function sayFirstToken({ bootstrap: { tokenFile } }: ServerConfig, token: string): void {
  if (tokenFile) {
    say(`The admin token was written to ${tokenFile}`);
    return;
  }
  say("-----BEGIN BERTH ADMIN TOKEN----- (shown once, valid for 90 days)");
  say(`export BERTH_TOKEN=${token}`);
  say("-----END BERTH ADMIN TOKEN-----");
}
