import type { ServiceImpl } from "@connectrpc/connect";
import type {
  Account,
  AccountService,
  DeleteAccountRequest,
  ListJoinableOrganizationsRequest,
  ListLoginProvidersRequest,
} from "../../gen/gitpod/v1/account_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import { type App, attribution, transact } from "../app.ts";
import { emailDomain, isPublicEmailDomain } from "../domain/email-domains.ts";
import { notFound, precondition } from "../domain/errors.ts";
import { closePage, openPage } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { principal } from "../rpc/authenticate.ts";
import { deleteAccount, getAccount, holdAccount, listJoinable } from "../store/accounts.ts";
import { endMembership } from "../store/departures.ts";
import { holdUser } from "../store/users.ts";

async function ownAccount(app: App, { accountId }: Caller): Promise<Account> {
  const account = await getAccount(app.db.point, accountId);
  const publicEmailProvider = isPublicEmailDomain(emailDomain(account.email), app.config.publicEmailDomains);
  return { ...account, publicEmailProvider };
}

async function remove(app: App, caller: Caller, { accountId, reason }: DeleteAccountRequest): Promise<void> {
  if (accountId.toLowerCase() !== caller.accountId) throw notFound("account", accountId);
  const by = attribution(app, caller);
  const action = reason?.trim() ? `Account deleted: ${reason.trim()}` : "Account deleted";
  await transact(app, async (tx, touched) => {
    const users = await holdAccount(tx, caller.accountId);
    if (users.some(({ status }) => status === UserStatus.ACTIVE))
      throw precondition("the account is a member of an organization: leave it first");
    for (const suspended of users) {
      const user = await holdUser(tx, suspended);
      const departure = { status: UserStatus.LEFT, action: "User left", keepsAccount: true } as const;
      await endMembership(tx, user, departure, by, touched);
    }
    await deleteAccount(tx, caller.accountId, { ...by, action, forgets: true });
  });
}

async function joinable(app: App, caller: Caller, request: ListJoinableOrganizationsRequest) {
  const page = openPage(request.pagination, ["joinable organizations", caller.accountId]);
  const rows = await listJoinable(app.db.list, caller.accountId, page);
  const { items, nextToken } = closePage(page, rows, (each) => each.organizationId);
  return { joinableOrganizations: items, pagination: { nextToken } };
}

/** The operator's providers, in the operator's order. Neither invites nor logins of organizations exist yet. */
function loginProviders(app: App, { filter, pagination }: ListLoginProvidersRequest) {
  if (filter?.inviteId) throw notFound("invite", filter.inviteId);
  const page = openPage(pagination, ["login providers", emailDomain(filter?.email ?? "")]);
  const ids = app.config.login.providers.map(({ id }) => id);
  const rest = ids.slice(ids.indexOf(page.after) + 1);
  const { items, nextToken } = closePage(page, rest, (id) => id);
  const start = `${app.config.publicUrl}/auth/oidc/start?provider=`;
  const providers = items.map((provider) => ({ provider, loginUrl: start + provider }));
  return { loginProviders: providers, pagination: { nextToken }, allowCustom: false };
}

/** AccountService. */
export function accountService(app: App): ServiceImpl<typeof AccountService> {
  return {
    async getAccount(_request, context) {
      return { account: await ownAccount(app, principal(context)) };
    },
    async deleteAccount(request, context) {
      await remove(app, principal(context), request);
      return {};
    },
    // Organizations cannot bring a login of their own yet, so no domain has one.
    async getSSOLoginURL({ email }) {
      throw notFound("login for the domain", emailDomain(email));
    },
    async listSSOLogins(request) {
      openPage(request.pagination, ["logins", emailDomain(request.email), request.returnTo]);
      return { logins: [], pagination: {} };
    },
    listJoinableOrganizations: (request, context) => joinable(app, principal(context), request),
    listLoginProviders: async (request) => loginProviders(app, request),
  };
}
