import { EditorService } from "../../gen/gitpod/v1/editor_pb.js";
import { EDITORS } from "../../src/domain/editors.ts";
import { section } from "./section.ts";

const TABLE = `
                   no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  listEditors      U  D  ✓  ✓  ✓  ✓  ✓  ✓  ✓  D  D  ✓  ✓  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getEditor        U  D  ✓  ✓  ✓  ✓  ✓  ✓  ✓  D  D  ✓  ✓  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  resolveEditorURL U  D  N  N  D  F  D  N  N  D  D  D  D  .  .  .  D  .  .  .  .  .  .  F  F  D  .  .
`;

export const editor = section(EditorService, TABLE, {
  getEditor: { request: () => ({ id: "vscode" }) },
  // It has no address for SSH.
  resolveEditorURL: {
    request: ({ environmentId, organizationId }) => ({ editorId: EDITORS[0]?.id, environmentId, organizationId }),
  },
});
