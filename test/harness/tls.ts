import { generateKeyPairSync, type KeyObject, sign } from "node:crypto";
import { chmod, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** A key for servers on 127.0.0.1, and a file with the authority that vouches for it, which everybody can read. */
export interface TestAuthority extends AsyncDisposable {
  key: string;
  cert: string;
  file: string;
}

const DAY_MS = 24 * 60 * 60_000;

/** An element of DER: tag, length, content. */
function der(tag: number, ...parts: readonly Uint8Array[]): Buffer {
  const content = Buffer.concat(parts);
  const length = content.length;
  const size = length < 0x80 ? [length] : length < 0x100 ? [0x81, length] : [0x82, length >> 8, length & 0xff];
  return Buffer.concat([Buffer.from([tag, ...size]), content]);
}

const sequence = (...parts: readonly Uint8Array[]) => der(0x30, ...parts);
const oid = (hex: string) => der(0x06, Buffer.from(hex, "hex"));
const time = (at: number) => der(0x18, Buffer.from(new Date(at).toISOString().replace(/[-:T]|\.\d+/g, "")));
const TRUE = Buffer.from([0x01, 0x01, 0xff]);
const ECDSA_WITH_SHA256 = sequence(oid("2a8648ce3d040302"));
const NAME = sequence(der(0x31, sequence(oid("550403"), der(0x0c, Buffer.from("berth test")))));
const IS_AUTHORITY = sequence(oid("551d13"), TRUE, der(0x04, sequence(TRUE)));
const FOR_LOOPBACK = sequence(oid("551d11"), der(0x04, sequence(der(0x87, Buffer.from([127, 0, 0, 1])))));

/** A certificate for 127.0.0.1 that vouches for itself. */
function certificate({ publicKey, privateKey }: { publicKey: KeyObject; privateKey: KeyObject }): string {
  const now = Date.now();
  const statement = sequence(
    der(0xa0, der(0x02, Buffer.from([2]))),
    der(0x02, Buffer.from([1])),
    ...[ECDSA_WITH_SHA256, NAME, sequence(time(now - DAY_MS), time(now + DAY_MS)), NAME],
    publicKey.export({ type: "spki", format: "der" }),
    der(0xa3, sequence(IS_AUTHORITY, FOR_LOOPBACK)),
  );
  const signature = der(0x03, Buffer.from([0]), sign("sha256", statement, privateKey));
  const text = sequence(statement, ECDSA_WITH_SHA256, signature).toString("base64");
  return `-----BEGIN CERTIFICATE-----\n${text.replace(/.{64}/g, "$&\n")}\n-----END CERTIFICATE-----\n`;
}

export async function newAuthority(): Promise<TestAuthority> {
  const pair = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const folder = await mkdtemp(join(tmpdir(), "berth-tls-"));
  await chmod(folder, 0o755);
  const file = join(folder, "authority.pem");
  const cert = certificate(pair);
  await writeFile(file, cert);
  return {
    ...{ cert, file, key: pair.privateKey.export({ type: "pkcs8", format: "pem" }).toString() },
    [Symbol.asyncDispose]: () => rm(folder, { recursive: true, force: true }),
  };
}
