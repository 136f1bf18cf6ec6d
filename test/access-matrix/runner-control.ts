import {
  DeregisterRequest_Reason as Reason,
  RunnerControlService,
} from "../../gen/berth/runner/v1/runner_control_pb.js";
import { RunnerPhase } from "../../gen/gitpod/v1/runner_pb.js";
import { section } from "./section.ts";
import type { World } from "./world.ts";

const status = { phase: RunnerPhase.ACTIVE, version: "test", publicKey: new Uint8Array(32) };
const link = ({ linkId }: World) => ({ linkId });

const TABLE = `
                         no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  register               U  D  D  D  D  D  D  D  D  F  F  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  heartbeat              U  D  D  D  D  D  D  D  D  ✓  A  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  watch                  U  D  D  D  D  D  D  D  D  ✓  A  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  reportEnvironments     U  D  D  D  D  D  D  D  D  ✓  A  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  reportAutomations      U  D  D  D  D  D  D  D  D  ✓  A  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getEnvironmentSecrets  U  D  D  D  D  D  D  D  D  ✓  N  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getHostToken           U  D  D  D  D  D  D  D  D  N  N  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  putHostToken           U  D  D  D  D  D  D  D  D  N  N  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createEnvironmentToken U  D  D  D  D  D  D  D  D  F  N  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  introspectToken        U  D  D  D  D  D  D  D  D  ✓  ✓  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  redeemPortToken        U  D  D  D  D  D  D  D  D  ✓  ✓  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  completeCall           U  D  D  D  D  D  D  D  D  ✓  ✓  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deregister             U  D  D  D  D  D  D  D  D  A  A  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
`;

export const runnerControl = section(RunnerControlService, TABLE, {
  // Of an older protocol, or the link of the test would end.
  register: { request: () => ({ instanceId: "x", protocolVersion: 0, maxEnvironments: 1, status }) },
  heartbeat: { request: (world) => ({ ...link(world), status }) },
  watch: { request: link },
  reportEnvironments: {
    request: (world) => ({ ...link(world), items: [{ environmentId: world.environmentId, seq: 1n }] }),
  },
  reportAutomations: { request: (world) => ({ ...link(world), services: [{ id: world.serviceId, seq: 1n }] }) },
  getEnvironmentSecrets: {
    request: ({ environmentId, userSecretId }) => ({ environmentId, secretIds: [userSecretId] }),
  },
  // There is none.
  getHostToken: {
    request: ({ environmentId }) => ({
      ...{ purpose: { case: "environmentId", value: environmentId }, host: "other.example.org" },
    }),
  },
  putHostToken: {
    request: ({ unknownId }) => ({ tokenId: unknownId, outcome: { case: "invalidReason", value: "x" } }),
  },
  // Of another session than the present one.
  createEnvironmentToken: { request: ({ environmentId }) => ({ environmentId, machineSession: "another" }) },
  introspectToken: { request: () => ({ token: "x" }) },
  redeemPortToken: { request: () => ({ token: "x" }) },
  completeCall: { request: ({ unknownId }) => ({ callId: unknownId }) },
  // Of another link, or that of the test would end.
  deregister: { request: ({ unknownId }) => ({ linkId: unknownId, reason: Reason.STOPPING }) },
});
