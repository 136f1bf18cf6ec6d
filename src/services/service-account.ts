import { timestampDate } from "@bufbuild/protobuf/wkt";
import type { ServiceImpl } from "@connectrpc/connect";
import type {
  CreateServiceAccountRequest,
  ListServiceAccountsRequest,
  ServiceAccount,
  ServiceAccountService,
  UpdateServiceAccountRequest,
} from "../../gen/gitpod/v1/service_account_pb.js";
import { type App, attribution, transact } from "../app.ts";
import { actionable, denied, invalid, precondition } from "../domain/errors.ts";
import { closePage, openPage } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { principal } from "../rpc/authenticate.ts";
import type { Tx } from "../store/db.ts";
import { endServiceAccount } from "../store/departures.ts";
import { syncBuiltInGroups } from "../store/groups.ts";
import {
  countServiceAccounts,
  getServiceAccount,
  insertServiceAccount,
  listServiceAccounts,
  type StoredServiceAccount,
  serviceAccountMessage,
  updateServiceAccount,
} from "../store/service-accounts.ts";
import { serviceAccountTokens } from "./service-account/tokens.ts";

function checkAdmin(caller: Caller): void {
  if (!caller.orgAdmin) throw denied("managing service accounts needs the role admin in the organization");
}

async function create(app: App, caller: Caller, request: CreateServiceAccountRequest): Promise<ServiceAccount> {
  checkAdmin(caller);
  const by = attribution(app, caller);
  const validUntil = request.validUntil && timestampDate(request.validUntil);
  if (!validUntil || validUntil <= by.at) throw invalid({ field: "valid_until", message: "must be in the future" });
  const { name, description } = request;
  const account: StoredServiceAccount = {
    ...{ id: app.newId(), organizationId: caller.organizationId, name, description, createdAt: by.at, validUntil },
    ...{ creatorId: caller.id, creatorPrincipal: caller.principal },
    ...{ suspended: false, systemManaged: false, administers: true },
  };
  await transact(app, async (tx) => {
    const most = app.limits.serviceAccounts;
    if ((await countServiceAccounts(tx, account.organizationId)) >= most)
      throw actionable("resource_exhausted", "PLATFORM_LIMIT_QUOTA", `there can be at most ${most} service accounts`);
    await insertServiceAccount(tx, account, by);
    await syncBuiltInGroups(tx, { organizationId: account.organizationId, memberId: account.id }, by);
  });
  return serviceAccountMessage(account);
}

/** A service account that the caller may change and that takes changes, held until the transaction ends. */
async function holdChangeable(tx: Tx, caller: Caller, id: string): Promise<StoredServiceAccount> {
  const account = await getServiceAccount(tx, caller, id, true);
  checkAdmin(caller);
  if (account.systemManaged) throw precondition("the service account is managed by the system");
  return account;
}

async function update(app: App, caller: Caller, request: UpdateServiceAccountRequest): Promise<ServiceAccount> {
  return transact(app, async (tx) => {
    const before = await holdChangeable(tx, caller, request.serviceAccountId);
    if (before.suspended) throw precondition("the service account is deleted");
    const { name = before.name, description = before.description } = request;
    const next = { ...before, name, description };
    await updateServiceAccount(tx, before, next, attribution(app, caller));
    return serviceAccountMessage(next);
  });
}

async function list(app: App, caller: Caller, request: ListServiceAccountsRequest) {
  const page = openPage(request.pagination, ["service accounts", caller.id, request.filter]);
  const rows = await listServiceAccounts(app.db.list, caller, request.filter, page);
  const { items, nextToken } = closePage(page, rows, (account) => account.id);
  return { serviceAccounts: items.map(serviceAccountMessage), pagination: { nextToken } };
}

/** ServiceAccountService. */
export function serviceAccountService(app: App): ServiceImpl<typeof ServiceAccountService> {
  return {
    async createServiceAccount(request, context) {
      return { serviceAccount: await create(app, principal(context), request) };
    },
    listServiceAccounts: (request, context) => list(app, principal(context), request),
    async getServiceAccount(request, context) {
      const account = await getServiceAccount(app.db.point, principal(context), request.serviceAccountId);
      return { serviceAccount: serviceAccountMessage(account) };
    },
    async updateServiceAccount(request, context) {
      return { serviceAccount: await update(app, principal(context), request) };
    },
    async deleteServiceAccount(request, context) {
      const caller = principal(context);
      await transact(app, async (tx, touched) => {
        const account = await holdChangeable(tx, caller, request.serviceAccountId);
        if (!account.suspended) await endServiceAccount(tx, account, attribution(app, caller), touched);
      });
      return {};
    },
    ...serviceAccountTokens(app),
  };
}
