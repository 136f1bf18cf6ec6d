import type { SCMIntegration } from "../../gen/gitpod/v1/runner_configuration_pb.js";
import type { ParseContextURLResponse } from "../../gen/gitpod/v1/runner_pb.js";
import { parseContextUrl } from "../scm/context-url.ts";
import { ScmError } from "../scm/errors.ts";
import type { Guard } from "../scm/guard.ts";
import type { ControlPlane } from "./control-plane.ts";
import { type HostCredentials, hostCredentials, type Purpose, type Renewing } from "./secrets/host-credentials.ts";

// Hosts that admins have integrated may be private, and are of a product that their name does not tell.

const KEPT_MS = 30_000;
const PAGE_SIZE = 100;
const MAX_PAGES = 20;

/** What a runner knows of hosts, and does there. */
export interface SourceControl {
  /** Also admits private addresses of hosts that belong to an integration. */
  guard: Guard;
  /** What a context URL stands for, as seen with the credential of whoever it is for. Throws ScmError. */
  resolveContext(url: string, purpose: Purpose, signal: AbortSignal): Promise<ParseContextURLResponse>;
  /** A credential for git at a host, renewed if it is about to end; undefined if there is none, or none any more. */
  hostCredentials(purpose: Purpose, host: string, signal: AbortSignal): Promise<HostCredentials | undefined>;
}

async function listIntegrations({ configuration }: ControlPlane): Promise<SCMIntegration[]> {
  const found: SCMIntegration[] = [];
  let token = "";
  for (let pages = 0; pages < MAX_PAGES && (pages === 0 || token); pages++) {
    const answer = await configuration.listSCMIntegrations({ pagination: { pageSize: PAGE_SIZE, token } });
    found.push(...answer.integrations);
    token = answer.pagination?.nextToken ?? "";
  }
  return found;
}

/** The host of an address as integrations spell it; ports of ssh are not those of the web. */
function isHostOf({ host }: SCMIntegration, address: string | URL): boolean {
  const url = URL.parse(String(address));
  if (url?.protocol === "ssh:") return url.hostname.toLowerCase() === host.replace(/:\d+$/, "");
  return url?.host.toLowerCase() === host;
}

/** Source control of a runner; integrations that have changed count within 30 s. `open` opens what was sealed for it. */
export function sourceControl(
  controlPlane: ControlPlane,
  own: Guard,
  publicUrl: string,
  open: Renewing["open"],
): SourceControl {
  let known: { integrations: Promise<SCMIntegration[]>; until: number } | undefined;

  async function integrations(): Promise<SCMIntegration[]> {
    const entry =
      known && known.until > Date.now()
        ? known
        : { integrations: listIntegrations(controlPlane), until: Date.now() + KEPT_MS };
    known = entry;
    try {
      return await entry.integrations;
    } catch (error) {
      if (known === entry) known = undefined;
      throw error;
    }
  }

  const guard: Guard = {
    schemes: own.schemes,
    async admit(address, options = {}) {
      try {
        return await own.admit(address, options);
      } catch (error) {
        // Hosts that everybody may reach need no question to the control plane.
        const isBlocked = error instanceof ScmError && error.kind === "blocked" && !options.vouched;
        if (!isBlocked || !(await integrations()).some((each) => isHostOf(each, address))) throw error;
        return await own.admit(address, { ...options, vouched: true });
      }
    },
  };

  const credentials: SourceControl["hostCredentials"] = (purpose, host, signal) =>
    hostCredentials(controlPlane, { guard, integrations, open }, purpose, host, signal);

  return {
    guard,
    hostCredentials: credentials,
    async resolveContext(url, purpose, signal) {
      return await parseContextUrl(url, {
        ...{ guard: own, publicUrl, signal, integrations: await integrations() },
        credentials: (host, _scmId, ends) => credentials(purpose, host, ends),
      });
    },
  };
}
