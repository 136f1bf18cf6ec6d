import { BlockList, isIP } from "node:net";
import type { HttpRequest } from "./exchange.ts";

const MAX_HOPS = 32;

const family = (address: string) => (isIP(address) === 6 ? "ipv6" : "ipv4");
/** An address without its zone; IPv4 that arrives on an IPv6 socket, as IPv4. */
const plain = (address: string) => address.replace(/^::ffff:(?=\d+\.)/i, "").replace(/%.*/s, "");

/**
 * Tells the address of callers. `trusted` are addresses or networks (`10.0.0.0/8`) of proxies whose `X-Forwarded-For` is
 * believed: the caller is the last address in the chain that is none of them. Throws for what is no address.
 */
export function peerResolver(trusted: readonly string[]): (request: HttpRequest) => string {
  const proxies = new BlockList();
  for (const entry of trusted) {
    const [address = "", prefix] = entry.split("/");
    if (!isIP(address)) throw new Error(`${entry} is no IP address or network`);
    if (prefix === undefined) proxies.addAddress(address, family(address));
    else proxies.addSubnet(address, Number(prefix), family(address));
  }
  return (request) => {
    let peer = plain(request.socket?.remoteAddress ?? "");
    if (trusted.length === 0) return peer;
    const forwarded = String(request.headers["x-forwarded-for"] ?? "")
      .split(",")
      .slice(-MAX_HOPS);
    while (isIP(peer) && proxies.check(peer, family(peer))) {
      const before = plain((forwarded.pop() ?? "").trim());
      if (!isIP(before)) break;
      peer = before;
    }
    return peer;
  };
}
