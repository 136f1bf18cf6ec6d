import type { ServerConfig } from "../config.ts";

/** A line of the result, which scripts read. */
export const say = (text: string): void => void process.stdout.write(`${text}\n`);

/** A line for people, beside the result. */
export const tell = (text: string): void => void process.stderr.write(`${text}\n`);

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
