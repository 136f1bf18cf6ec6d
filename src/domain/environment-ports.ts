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
