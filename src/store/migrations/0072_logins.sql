-- A browser on its way to an identity provider and back. The state that comes back is not stored, only its hash, and the
-- same goes for what ties it to the browser.
create table login_flows (
  state_hash bytea primary key,
  browser_hash bytea not null,
  provider text not null,
  nonce text not null,
  code_verifier text not null,
  return_to text not null,
  expires_at timestamptz not null
);
create index login_flows_expiry on login_flows (expires_at);

-- What `berth login` gets from a browser and swaps for a token, once.
create table login_codes (
  code_hash bytea primary key,
  user_id uuid not null references users on delete cascade,
  -- Challenge of RFC 7636, method S256.
  code_challenge text not null,
  description text not null,
  expires_at timestamptz not null
);
create index login_codes_expiry on login_codes (expires_at);
