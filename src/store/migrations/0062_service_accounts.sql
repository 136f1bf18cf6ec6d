alter table service_accounts
  drop column message,
  add column description text not null default '',
  add column creator_id uuid not null,
  add column creator_principal smallint not null,
  add column created_at timestamptz not null,
  add column system_managed boolean not null default false,
  -- Lower-case text that ListServiceAccounts searches.
  add column search text not null generated always as (lower(name || E'\n' || description || E'\n' || id)) stored;
create index service_accounts_live on service_accounts (organization_id, id) where not suspended;

create index tokens_issuer on tokens (issuer_id) where issuer_id is not null;
