alter table organizations
  -- Null until something of it changes.
  add column updated_at timestamptz,
  add column invite_domains text[] not null default '{}';

-- Whose environments have to stop: those of a user, of a service account, or, under the id of an organization, those on
-- its local runners. Written with the change that ends them, it only says where to look: the state that is found there
-- decides. It stays for a while, for what was under way when the change was made.
create table halts (
  subject_id uuid primary key,
  organization_id uuid not null references organizations on delete cascade,
  created_at timestamptz not null,
  -- When to look again.
  due_at timestamptz not null
);
create index halts_due on halts (due_at);
