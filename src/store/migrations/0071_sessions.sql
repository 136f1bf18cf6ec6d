-- Browser logins. A person who has signed in but not chosen an organization yet belongs to none.
alter table tokens alter column organization_id drop not null;
-- A login ends also when it has not been used for so long.
alter table tokens add column idle_seconds integer;
