import { lookup } from "node:dns/promises";
import { BlockList, isIP, isIPv4 } from "node:net";
import { ScmError } from "./errors.ts";

const LOOKUP_MS = 5_000;
const MAX_ADDRESSES = 64;
const DEFAULT_PORTS: Readonly<Record<string, number>> = { "https:": 443, "http:": 80, "ssh:": 22, "git:": 9418 };

/** One text for every refused address, so that it tells nothing about what a name resolves to. */
export const BLOCKED_ADDRESS = "this host is not allowed for source control";

/** All addresses of a host name. */
export type HostResolver = (host: string) => Promise<string[]>;

export interface GuardOptions {
  /** `host[:port]` entries that may be reached by http and at private or loopback addresses; without port: any port. */
  allowHosts: readonly string[];
  /** Clone schemes beside https and ssh: `file`, `http`, `git`. */
  schemes: readonly string[];
  /** For tests; the system's resolver otherwise. */
  resolve?: HostResolver;
}

/** A URL that may be contacted, at these addresses and no others. */
export interface AdmittedUrl {
  /** Without query and fragment; a user name only with ssh. */
  url: URL;
  /** Host name or address, without brackets; empty for `file`. */
  host: string;
  port: number;
  /** Checked addresses; connections go to these, whatever the name resolves to later. Empty for `file`. */
  addresses: readonly string[];
}

export interface Guard {
  readonly schemes: readonly string[];
  /**
   * Checks scheme, host and every address the host has. `vouched`: the host belongs to an integration, so an admin
   * stands for it and it may be private. Throws `invalid_url`, `blocked`, `not_found` (no such name) or `unavailable`.
   */
  admit(url: string | URL, options?: { vouched?: boolean; signal?: AbortSignal }): Promise<AdmittedUrl>;
}

type AddressClass = "public" | "private" | "loopback" | "never";

function blockList(...ranges: string[]): BlockList {
  const list = new BlockList();
  for (const range of ranges) {
    const [network = "", prefix] = range.split("/");
    list.addSubnet(network, Number(prefix), isIPv4(network) ? "ipv4" : "ipv6");
  }
  return list;
}

const LOOPBACK = blockList("127.0.0.0/8", "::1/128");
const PRIVATE = blockList(
  "10.0.0.0/8",
  "172.16.0.0/12",
  "192.168.0.0/16",
  "100.64.0.0/10",
  "198.18.0.0/15",
  "fc00::/7",
  "fec0::/10",
);
// Unspecified, link-local, multicast, reserved, tunnels, and where clouds serve their machine metadata.
const NEVER = blockList(
  "0.0.0.0/8",
  "169.254.0.0/16",
  "192.0.0.0/24",
  "224.0.0.0/4",
  "240.0.0.0/4",
  "100.100.100.200/32",
  "168.63.129.16/32",
  "::/128",
  "fe80::/10",
  "ff00::/8",
  "2001::/32",
  "64:ff9b:1::/48",
  "fd00:ec2::254/128",
  "fd20:ce::254/128",
);

/** The eight 16-bit groups of an IPv6 address in any spelling; undefined with a zone. */
function groups(address: string): number[] | undefined {
  const canonical = URL.parse(`http://[${address}]`)?.hostname.slice(1, -1);
  if (canonical === undefined) return undefined;
  const [head = "", tail] = canonical.split("::");
  const numbers = (text: string) => (text ? text.split(":").map((group) => Number.parseInt(group, 16)) : []);
  if (tail === undefined) return numbers(head);
  const zeros = 8 - numbers(head).length - numbers(tail).length;
  return [...numbers(head), ...Array<number>(zeros).fill(0), ...numbers(tail)];
}

/** The IPv4 address that traffic to an IPv6 address ends up at: mapped, compatible, NAT64 and 6to4 forms. */
function embeddedIPv4(parts: readonly number[]): string | undefined {
  const at = (index: number) => {
    const [high = 0, low = 0] = parts.slice(index, index + 2);
    return [high >> 8, high & 255, low >> 8, low & 255].join(".");
  };
  if (parts[0] === 0x2002) return at(1);
  const upper = parts.slice(0, 6).join(":");
  const isMapped = upper === "0:0:0:0:0:65535";
  const isCompatible = upper === "0:0:0:0:0:0" && (parts[6] !== 0 || (parts[7] ?? 0) > 1);
  const isNat64 = upper === [0x64, 0xff9b, 0, 0, 0, 0].join(":");
  return isMapped || isCompatible || isNat64 ? at(6) : undefined;
}

/** What kind of place an address is; anything that cannot be read is `never`. */
export function classifyAddress(address: string): AddressClass {
  if (isIP(address) === 6) {
    const parts = groups(address);
    if (!parts) return "never";
    const embedded = embeddedIPv4(parts);
    if (embedded) return classifyAddress(embedded);
  }
  const family = isIPv4(address) ? "ipv4" : "ipv6";
  if (!isIP(address) || NEVER.check(address, family)) return "never";
  if (LOOPBACK.check(address, family)) return "loopback";
  return PRIVATE.check(address, family) ? "private" : "public";
}

const withoutBrackets = (hostname: string) => hostname.replace(/^\[|\]$/g, "");

function parseAllowed(entry: string): { host: string; port: number | undefined } {
  const [, name = "", port] =
    /^(\[[^\]]+\]|[^:[\]]+)(?::(\d{1,5}))?$/.exec(isIP(entry) === 6 ? `[${entry}]` : entry) ?? [];
  const url = URL.parse(`https://${name}`);
  if (!url || url.host === "" || url.pathname !== "/" || url.username || url.search || url.hash) {
    throw new TypeError(`not a host[:port]: ${entry}`);
  }
  return { host: withoutBrackets(url.hostname), port: port === undefined ? undefined : Number(port) };
}

const systemResolver: HostResolver = async (host) => (await lookup(host, { all: true })).map(({ address }) => address);

/** Resolves a name within LOOKUP_MS; rejects early when `signal` aborts. */
async function addressesOf(host: string, resolve: HostResolver, signal: AbortSignal | undefined): Promise<string[]> {
  const deadline = AbortSignal.any([AbortSignal.timeout(LOOKUP_MS), ...(signal ? [signal] : [])]);
  const { promise: ended, reject } = Promise.withResolvers<never>();
  const late = new ScmError("unavailable", `the name of host ${host} could not be resolved in time`);
  const cancelled = new ScmError("timeout", "the request was cancelled or ran out of time");
  const onAbort = () => reject(signal?.aborted ? cancelled : late);
  if (deadline.aborted) onAbort();
  deadline.addEventListener("abort", onAbort);
  try {
    return await Promise.race([ended, resolve(host)]);
  } catch (error) {
    if (error instanceof ScmError) throw error;
    const isTemporary = error instanceof Error && "code" in error && error.code === "EAI_AGAIN";
    if (isTemporary) throw new ScmError("unavailable", `the name of host ${host} could not be resolved`);
    throw new ScmError("not_found", `host ${host} does not exist`);
  } finally {
    deadline.removeEventListener("abort", onAbort);
  }
}

/** Decides which hosts may be contacted. Throws TypeError for an entry of `allowHosts` that is no `host[:port]`. */
export function createGuard({ allowHosts, schemes, resolve = systemResolver }: GuardOptions): Guard {
  const allowed = allowHosts.map(parseAllowed);
  const isAllowed = (host: string, port: number) =>
    allowed.some((entry) => entry.host === host && (entry.port ?? port) === port);

  function checkScheme(url: URL, listed: boolean): void {
    const scheme = url.protocol.slice(0, -1);
    if (scheme === "https" || scheme === "ssh" || (scheme === "http" && listed)) return;
    if (scheme === "http")
      throw new ScmError("blocked", "http is only allowed for hosts the operator has listed; use https");
    if (!schemes.includes(scheme))
      throw new ScmError("invalid_url", "the scheme of the address is not allowed; use https");
  }

  return {
    schemes,
    async admit(address, { vouched = false, signal } = {}) {
      const url = URL.parse(String(address));
      if (!url) throw new ScmError("invalid_url", "the address is not a URL");
      if (url.password) throw new ScmError("invalid_url", "the address must not contain a password");
      const isFile = url.protocol === "file:";
      const host = withoutBrackets(url.hostname).toLowerCase().replace(/\.$/, "");
      const port = url.port === "" ? (DEFAULT_PORTS[url.protocol] ?? 0) : Number(url.port);
      const listed = isAllowed(host, port);
      checkScheme(url, listed);
      if (isFile !== (host === "")) throw new ScmError("invalid_url", "the address must name a host");
      if (url.protocol !== "ssh:") url.username = "";
      url.search = "";
      url.hash = "";
      if (isFile) return { url, host, port: 0, addresses: [] };

      // Names keep no trailing dot: what is pinned must be spelled exactly as in the request.
      if (!isIP(host)) url.hostname = host;
      const addresses = isIP(host) ? [host] : await addressesOf(host, resolve, signal);
      if (addresses.length === 0) throw new ScmError("not_found", `host ${host} does not exist`);
      const mayContact = (place: AddressClass) =>
        place === "public" || (place === "private" && (listed || vouched)) || (place === "loopback" && listed);
      if (addresses.length > MAX_ADDRESSES || !addresses.map(classifyAddress).every(mayContact)) {
        throw new ScmError("blocked", BLOCKED_ADDRESS);
      }
      return { url, host, port, addresses };
    },
  };
}
