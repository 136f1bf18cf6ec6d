import { UserService } from "../../gen/gitpod/v1/user_pb.js";
import { section } from "./section.ts";
import type { World } from "./world.ts";

const creator = ({ userId }: World) => ({ userId });
const other = ({ otherUserId }: World) => ({ userId: otherUserId });
const token = ({ tokenId }: World) => ({ personalAccessTokenId: tokenId });

const TABLE = `
                                          no ac fo me ro cr ad st sa rt r2 en e2 or op og oe oa ra ru pa pe pu ea eu ev ga sv
  getAuthenticatedUser                    U  D  ✓  ✓  ✓  ✓  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getUser                                 U  D  N  ✓  ✓  ✓  ✓  ✓  ✓  D  D  ✓  N  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getUser other                           U  D  N  ✓  ✓  ✓  ✓  ✓  ✓  D  D  N  N  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  setSuspended                            U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deleteUser                              U  D  N  D  D  D  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  createPersonalAccessToken               U  D  N  D  D  ✓  D  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getPersonalAccessToken                  U  D  N  N  ✓  ✓  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listPersonalAccessTokens                U  D  0  0  ✓  ✓  0  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listPersonalAccessTokens of the creator U  D  0  0  ✓  ✓  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deletePersonalAccessToken               U  D  N  N  D  ✓  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  setPreference                           U  D  ✓  ✓  D  ✓  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getPreference                           U  D  N  N  ✓  ✓  N  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  listPreferences                         U  D  0  0  ✓  ✓  0  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  deletePreference                        U  D  N  N  D  ✓  N  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  getDotfilesConfiguration                U  D  ✓  ✓  ✓  ✓  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
  setDotfilesConfiguration                U  D  ✓  ✓  D  ✓  ✓  D  D  D  D  D  D  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
`;

export const user = section(UserService, TABLE, {
  getUser: { request: creator },
  "getUser other": { request: other },
  setSuspended: { request: (world) => ({ ...other(world), suspended: false }) },
  deleteUser: { request: creator, fresh: ["userId"] },
  createPersonalAccessToken: { request: creator },
  getPersonalAccessToken: { request: token },
  listPersonalAccessTokens: { finds: ({ tokenId }) => tokenId },
  "listPersonalAccessTokens of the creator": {
    request: ({ userId }) => ({ filter: { userIds: [userId] } }),
    finds: ({ tokenId }) => tokenId,
  },
  deletePersonalAccessToken: { request: token, fresh: ["tokenId"] },
  setPreference: { request: () => ({ key: "theme", value: "dark" }) },
  getPreference: { request: ({ preferenceId }) => ({ preference: { case: "preferenceId", value: preferenceId } }) },
  listPreferences: { finds: ({ preferenceId }) => preferenceId },
  deletePreference: { request: ({ preferenceId }) => ({ userPreferenceId: preferenceId }), fresh: ["preferenceId"] },
  setDotfilesConfiguration: { request: () => ({ repository: "https://git.example.org/a/dotfiles" }) },
});
