-- What members see of each other is kept with the user, in step with its account: it outlives the account, so that the
-- maker of something that stays still has a name, and the list of members needs one index.
alter table accounts add column updated_at timestamptz;
alter table users
  alter column account_id drop not null,
  add column full_name text not null default '',
  add column email text not null default '',
  add column avatar_url text not null default '',
  add column login_provider text not null default '',
  -- Lower-case text that ListMembers searches.
  add column search text not null generated always as (lower(full_name || E'\n' || email)) stored,
  add column created_at timestamptz,
  add column dotfiles_repository text not null default '';

create function full_name(a accounts) returns text immutable language sql as $$
  select coalesce(nullif(btrim(a.name), ''), split_part(a.email, '@', 1))
$$;

update users u set full_name = full_name(a), email = a.email, avatar_url = a.avatar_url, login_provider = a.login_provider,
  created_at = u.member_since from accounts a where a.id = u.account_id;
alter table users alter column created_at set not null;

create function copy_account_to_user() returns trigger language plpgsql as $$
begin
  select full_name(a), a.email, a.avatar_url, a.login_provider
    into strict new.full_name, new.email, new.avatar_url, new.login_provider from accounts a where a.id = new.account_id;
  new.created_at := coalesce(new.created_at, new.member_since);
  return new;
end $$;
create trigger users_copy_account before insert on users for each row execute function copy_account_to_user();

create function copy_account_to_users() returns trigger language plpgsql as $$
begin
  new.updated_at := now();
  update users set full_name = full_name(new), email = new.email, avatar_url = new.avatar_url, login_provider = new.login_provider
    where account_id = new.id;
  return new;
end $$;
create trigger accounts_copy_to_users before update of name, email, avatar_url, login_provider on accounts
  for each row when (old is distinct from new) execute function copy_account_to_users();

create index users_account on users (account_id) where account_id is not null;
create index users_name on users (organization_id, lower(full_name), id);
create index users_joined on users (organization_id, member_since, id);

create table user_preferences (
  id uuid primary key,
  user_id uuid not null references users on delete cascade,
  key text not null,
  value text not null,
  created_at timestamptz not null,
  updated_at timestamptz not null,
  unique (user_id, key)
);
create index user_preferences_list on user_preferences (user_id, id);
