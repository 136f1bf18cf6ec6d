import type { ServiceImpl } from "@connectrpc/connect";
import type { EnvironmentOpsService } from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { openStream } from "./connect-handler.ts";
import type { OpsDeps, OpsTools } from "./ops-tools.ts";
import { terminalProfiles } from "./terminal-profiles.ts";

type TerminalOps = Pick<
  ServiceImpl<typeof EnvironmentOpsService>,
  | "createTerminal"
  | "readTerminal"
  | "attachTerminal"
  | "writeTerminal"
  | "resizeTerminal"
  | "closeTerminal"
  | "listTerminals"
  | "listTerminalProfiles"
>;

/** The RPCs about terminals. */
export function terminalOps({ terminals, activity }: OpsDeps, { directory, inTime, streamed }: OpsTools): TerminalOps {
  const used = () => activity.onActivity("Terminal");
  return {
    async createTerminal(request) {
      used();
      const created = terminals.create(request, directory(request.workingDirectory));
      return { terminalId: await inTime("CreateTerminal", created) };
    },
    async *readTerminal({ terminalId, skipHistory }, context) {
      const output = terminals.get(terminalId).read(skipHistory, context.signal);
      openStream(context);
      for await (const data of streamed(output)) yield { data };
    },
    async *attachTerminal({ terminalId }, context) {
      yield* streamed(terminals.get(terminalId).attach(context.signal));
    },
    writeTerminal({ terminalId, data }) {
      used();
      terminals.get(terminalId).write(data);
      return {};
    },
    resizeTerminal({ terminalId, cols, rows }) {
      used();
      terminals.resize(terminalId, cols, rows);
      return {};
    },
    async closeTerminal({ terminalId }) {
      used();
      await inTime("CloseTerminal", terminals.get(terminalId).close());
      return {};
    },
    listTerminals: () => ({ terminals: terminals.list() }),
    async listTerminalProfiles(request) {
      return { profiles: await inTime("ListTerminalProfiles", terminalProfiles(request)) };
    },
  };
}
