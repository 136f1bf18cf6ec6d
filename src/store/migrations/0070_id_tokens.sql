-- Keys that sign ID tokens. Each is published before it is used and for a while afterwards.
create table signing_keys (
  id uuid primary key,
  -- As RFC 7517 writes it, in JSON.
  public_jwk text not null,
  -- PKCS #8 in PEM, under a data key; its context is "signing key <id>".
  sealed_private_key bytea not null,
  created_at timestamptz not null,
  -- First use; its last is the first one of the next key.
  active_at timestamptz not null
);

-- gitpod.v1.OIDCConfig; null is what new organizations start with.
alter table organizations add column oidc_config bytea;

-- What identity providers call an account.
create table account_identities (
  account_id uuid not null references accounts on delete cascade,
  -- Whose provider it is; null for those of the installation. Two organizations may trust the same issuer.
  owner_organization_id uuid references organizations,
  issuer text not null,
  subject text not null,
  -- What the provider said at the last login, in JSON, without the claims of the protocol.
  claims text not null default '{}',
  created_at timestamptz not null,
  last_login_at timestamptz not null
);
create unique index account_identities_key
  on account_identities (issuer, subject, coalesce(owner_organization_id, '00000000-0000-0000-0000-000000000000'));
create index account_identities_account on account_identities (account_id, last_login_at);
