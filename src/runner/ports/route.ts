/** Which port of which environment a request is for, and where its paths begin. */
export interface PortRoute {
  environmentId: string;
  port: number;
  /** What comes before the service's own paths; empty where the port has a host of its own. */
  prefix: string;
  /** Path and query for the service. */
  target: string;
}

const ID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}";
const PATH = new RegExp(`^(/environments/(${ID})/ports/([1-9]\\d{0,4}))([/?].*)?$`);
const LABEL = new RegExp(`^([1-9]\\d{0,4})--(${ID})$`);

/** Where clients reach a port: a host of its own below `domain`, else a path below the runner's public URL. */
export function portUrl(publicUrl: string, domain: string | undefined, environmentId: string, port: number): string {
  if (!domain) return `${publicUrl}/environments/${environmentId}/ports/${port}/`;
  return `https://${port}--${environmentId}.${domain}`;
}

const rooted = (target: string) => (target.startsWith("/") ? target : `/${target}`);

/** What a request is for, told by its host if there is a domain for ports, else by its path; undefined if no port. */
export function portRoute(host: string, url: string, domain: string | undefined): PortRoute | undefined {
  const name = host.replace(/:\d+$/, "").toLowerCase();
  const label = domain && name.endsWith(`.${domain}`) ? name.slice(0, -domain.length - 1) : undefined;
  const [, ownPort, ownId] = LABEL.exec(label ?? "") ?? [];
  if (ownPort && ownId) return { environmentId: ownId, port: Number(ownPort), prefix: "", target: rooted(url) };
  const [, prefix, environmentId, port, rest = ""] = PATH.exec(url) ?? [];
  if (!prefix || !environmentId) return undefined;
  return { environmentId, port: Number(port), prefix, target: rooted(rest) };
}
