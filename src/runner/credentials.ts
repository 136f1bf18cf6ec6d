import { generateKeyPairSync, type JsonWebKey } from "node:crypto";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { Code } from "@connectrpc/connect";
import type { Logger } from "pino";
import { ACCESS_TOKEN_MS } from "../domain/runner.ts";
import { openBox } from "../scm/sealed-box.ts";
import { type ControlPlane, codeOf, describe } from "./control-plane.ts";
import { readSmall, writeAtomically } from "./files.ts";

const MAX_FILE_BYTES = 16 * 1024;
const RENEW_AFTER_MS = (ACCESS_TOKEN_MS * 2) / 3;
const RETRY_MIN_MS = 500;
const RETRY_MAX_MS = 10_000;

interface StoredCredentials {
  accessToken?: string;
  /** When the access token was issued, milliseconds since the epoch. */
  issuedAt?: number;
  /** A first credential that has not been used yet. */
  exchangeToken?: string;
  runnerId?: string;
  controlPlaneId?: string;
  /** X25519 key that secrets for this runner are sealed to, as JWK. */
  privateKey?: JsonWebKey;
}

/** The control plane does not accept the runner, or is another one than before. */
export class RefusedError extends Error {
  /** It is not the credential: runner or installation are not those that the data folder belongs to. */
  readonly foreign: boolean;

  constructor(message: string, foreign = false) {
    super(message);
    this.foreign = foreign;
  }
}

function parse(text: string, path: string): StoredCredentials {
  try {
    return JSON.parse(text) as StoredCredentials;
  } catch {
    throw new Error(`${path} is damaged: restore it, or remove it and give the runner a new exchange token`);
  }
}

/** What the runner is known by, kept in `credentials.json` (0600) of its data folder. */
export class Credentials {
  readonly #path: string;
  readonly #log: Logger;
  #stored: StoredCredentials;

  private constructor(path: string, log: Logger, stored: StoredCredentials) {
    this.#path = path;
    this.#log = log;
    this.#stored = stored;
  }

  static async open(dataDir: string, exchangeToken: string | undefined, log: Logger): Promise<Credentials> {
    const path = join(dataDir, "credentials.json");
    const text = await readSmall(path, MAX_FILE_BYTES);
    const credentials = new Credentials(path, log, text ? parse(text, path) : {});
    await credentials.#update({
      privateKey: credentials.#stored.privateKey ?? generateKeyPairSync("x25519").privateKey.export({ format: "jwk" }),
      ...(exchangeToken && { exchangeToken }),
    });
    return credentials;
  }

  async #update(change: StoredCredentials): Promise<void> {
    this.#stored = { ...this.#stored, ...change };
    await writeAtomically(this.#path, JSON.stringify(this.#stored));
  }

  get accessToken(): string {
    return this.#stored.accessToken ?? "";
  }

  /** 32 bytes. */
  get publicKey(): Uint8Array<ArrayBuffer> {
    return new Uint8Array(Buffer.from(this.#stored.privateKey?.x ?? "", "base64url"));
  }

  /** What somebody has sealed for this runner; throws if it was sealed for another key. */
  async openSealed(sealed: Uint8Array): Promise<Uint8Array> {
    const privateKey = new Uint8Array(Buffer.from(this.#stored.privateKey?.d ?? "", "base64url"));
    return openBox(sealed, { publicKey: this.publicKey, privateKey });
  }

  /**
   * Uses the first credential if there is no access token yet, or if the one there is was refused. Tries until the
   * control plane answers; RefusedError if it does not accept it.
   */
  async signIn({ identity }: ControlPlane, signal: AbortSignal, isRefused = false): Promise<void> {
    if (this.#stored.accessToken && !isRefused) return;
    const { exchangeToken } = this.#stored;
    if (!exchangeToken) throw new RefusedError("the control plane refuses the credential of this runner");
    for (let pause = RETRY_MIN_MS; ; pause = Math.min(RETRY_MAX_MS, pause * 2)) {
      try {
        const { accessToken } = await identity.exchangeToken({ exchangeToken }, { signal });
        return await this.#update({ accessToken, issuedAt: Date.now(), exchangeToken: undefined });
      } catch (error) {
        signal.throwIfAborted();
        if (codeOf(error) === Code.Unauthenticated) {
          await this.#update({ exchangeToken: undefined });
          throw new RefusedError("the control plane refuses the exchange token of this runner");
        }
        this.#log.warn({ error: describe(error) }, "the exchange token could not be used yet");
        await delay(pause, undefined, { signal });
      }
    }
  }

  /** Gets another access token once two thirds of the life of the present one are over. */
  async renewIfDue({ runners, identity }: ControlPlane, signal: AbortSignal): Promise<void> {
    const { runnerId, issuedAt = 0 } = this.#stored;
    if (!runnerId || Date.now() - issuedAt < RENEW_AFTER_MS) return;
    const { exchangeToken } = await runners.createRunnerToken({ runnerId }, { signal });
    const { accessToken } = await identity.exchangeToken({ exchangeToken }, { signal });
    await this.#update({ accessToken, issuedAt: Date.now() });
    this.#log.info("the access token was renewed");
  }

  /**
   * Remembers whom this data folder belongs to. RefusedError if it is somebody else's and holds environments: they
   * would look unknown and be set aside.
   */
  async bind(runnerId: string, controlPlaneId: string, holdsEnvironments: boolean): Promise<void> {
    const { runnerId: knownRunner = runnerId, controlPlaneId: known = controlPlaneId } = this.#stored;
    const isOther = knownRunner !== runnerId || known !== controlPlaneId;
    if (isOther && holdsEnvironments) {
      throw new RefusedError(
        `the data folder belongs to runner ${knownRunner} of control plane ${known}, this is runner ${runnerId} of ${controlPlaneId}`,
        true,
      );
    }
    if (isOther || !this.#stored.runnerId) await this.#update({ runnerId, controlPlaneId });
  }

  /** The installation this data folder belongs to. */
  get controlPlaneId(): string {
    return this.#stored.controlPlaneId ?? "";
  }
}
