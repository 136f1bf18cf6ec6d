import { checkAdminToken, firstStart } from "../../first-start.ts";
import { openInstallation } from "../../installation.ts";
import { sayFirstToken } from "../output.ts";
import { readOptions } from "../usage.ts";
import { type AdminCommand, operatorConfig } from "./operator.ts";

export const bootstrapCommand: AdminCommand = {
  name: "bootstrap",
  options: "",
  about: "bring the database up to date and make the first organization, if there is none yet",
  async run(args, env) {
    readOptions("berth admin bootstrap", args, {});
    const { config: settings, log } = operatorConfig(env);
    const config = { ...settings, bootstrap: { ...settings.bootstrap, enabled: true } };
    checkAdminToken(config);
    const { db, close } = await openInstallation(config, log, { shared: true });
    try {
      const { token } = await firstStart(config, db, log, new Date());
      if (token) sayFirstToken(config, token);
    } finally {
      await close();
    }
  },
};
