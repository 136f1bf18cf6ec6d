import {
  AdmissionLevel,
  type EnvironmentSpec,
  type EnvironmentSpec_EnvironmentPort,
} from "../../gen/gitpod/v1/environment_pb.js";

/** Levels from the narrowest to the widest. */
const BY_WIDTH = [
  AdmissionLevel.UNSPECIFIED,
  AdmissionLevel.OWNER_ONLY,
  AdmissionLevel.CREATOR_ONLY,
  AdmissionLevel.ORGANIZATION,
  AdmissionLevel.EVERYONE,
];
const WIDTH = new Map(BY_WIDTH.map((level, width) => [level, width]));
const widthOf = (level: AdmissionLevel) => WIDTH.get(level) ?? 0;

const OPEN_TO_MEMBERS: ReadonlySet<AdmissionLevel> = new Set([AdmissionLevel.ORGANIZATION, AdmissionLevel.EVERYONE]);

/** Lets more people in than the other one. */
export const isWider = (level: AdmissionLevel, than: AdmissionLevel) => widthOf(level) > widthOf(than);

/** The entry of a port, if it is listed. */
export const portOf = (spec: EnvironmentSpec, port: number): EnvironmentSpec_EnvironmentPort | undefined =>
  spec.ports.find((each) => each.port === port);

/** Whether an active member of the organization may reach a port; a narrow one lets in the creator and nobody else. */
export const admits = (
  port: Pick<EnvironmentSpec_EnvironmentPort, "admission">,
  creatorId: string | undefined,
  memberId: string,
) => OPEN_TO_MEMBERS.has(port.admission) || memberId === creatorId;

/** What somebody with a browser wants to see. */
export interface PortVisit {
  environmentId: string;
  port: number;
  /** The full address of it. */
  returnTo: string;
}

/** Query parameter with which a browser comes back from signing in. */
export const PORT_TOKEN_PARAMETER = "berth_port_token";

/**
 * The query of an address without tokens for ports, `?` included. The rest stays as it is written, which services may
 * make a difference of.
 */
export function withoutPortToken(search: string): string {
  const pairs = search.slice(1).split("&");
  const rest = pairs.filter((pair) => !new URLSearchParams(pair).has(PORT_TOKEN_PARAMETER)).join("&");
  return rest && `?${rest}`;
}

/** The address at its port with a token, instead of any that it has. */
export function withPortToken({ origin, pathname, search }: URL, token: string): string {
  const rest = withoutPortToken(search);
  return `${origin}${pathname}${rest ? `${rest}&` : "?"}${PORT_TOKEN_PARAMETER}=${token}`;
}

/**
 * An address that somebody gave, if it lies at a port's own: ports can share host and port with each other and with all
 * else that their runner serves.
 */
export function addressBelow(portUrl: string, address: string): URL | undefined {
  const [port, target] = [URL.parse(portUrl), URL.parse(address)];
  // Browsers read a backslash as a slash, and drop control characters.
  if (!port || !target || /[\\\p{Cc}]/u.test(address) || target.username || target.password) return undefined;
  const isThere = target.origin === port.origin && target.pathname.startsWith(port.pathname.replace(/\/?$/, "/"));
  return isThere && /^https?:$/.test(target.protocol) ? target : undefined;
}
