import { account } from "./account.ts";
import { automation } from "./automation.ts";
import { editor } from "./editor.ts";
import { environment } from "./environment.ts";
import { event } from "./event.ts";
import { gateway } from "./gateway.ts";
import { group } from "./group.ts";
import { identity } from "./identity.ts";
import { organization } from "./organization.ts";
import { project } from "./project.ts";
import { runner } from "./runner.ts";
import { runnerConfiguration } from "./runner-configuration.ts";
import { runnerControl } from "./runner-control.ts";
import { secret } from "./secret.ts";
import { serviceAccount } from "./service-account.ts";
import { usage } from "./usage.ts";
import { user } from "./user.ts";

/** One for each service that the control plane registers. */
export const sections = [
  ...[account, automation, editor, environment, event, gateway, group, identity, organization, project, runner],
  ...[runnerConfiguration, runnerControl, secret, serviceAccount, usage, user],
];
