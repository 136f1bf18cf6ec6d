import type { ServiceImpl } from "@connectrpc/connect";
import { EditorService } from "../../gen/gitpod/v1/editor_pb.js";
import type { App } from "../app.ts";
import { withPending } from "../pending.ts";

/** EditorService, as far as it is built. */
export function editorService(_app: App): ServiceImpl<typeof EditorService> {
  return withPending(EditorService, ["listEditors", "getEditor", "resolveEditorURL"], {});
}
