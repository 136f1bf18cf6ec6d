-- A direct share is a hidden group of one principal, found by that principal. The number of members is kept with the group,
-- so that lists need not count and a limit is checked under the lock of the group's row.
alter table groups
  add column direct_share_of uuid,
  add column scim_managed boolean not null default false,
  add column member_count integer not null default 0,
  add constraint groups_direct_share check (direct_share = (direct_share_of is not null));
create unique index groups_direct_share_of on groups (direct_share_of) where direct_share_of is not null;
create index groups_list on groups (organization_id, id) where not direct_share;
create index groups_direct_shares on groups (organization_id, id) where direct_share;

create index group_members_list on group_members (group_id, id);

update groups g set member_count = (select count(*) from group_members m where m.group_id = g.id);

create function count_group_members() returns trigger language plpgsql as $$
begin
  update groups g set member_count = g.member_count + c.members
  from (select group_id, count(*) * case tg_op when 'INSERT' then 1 else -1 end as members from changed group by group_id) c
  where g.id = c.group_id;
  return null;
end $$;
create trigger group_members_joined after insert on group_members
  referencing new table as changed for each statement execute function count_group_members();
create trigger group_members_left after delete on group_members
  referencing old table as changed for each statement execute function count_group_members();

-- One role of a group on a resource; on the organization (7) one of each kind, as the table says.
create unique index role_assignments_one on role_assignments (group_id, resource_id) where resource_type <> 7;
-- One for each way to list them, newest first.
create index role_assignments_list on role_assignments (organization_id, id);
create index role_assignments_of_role on role_assignments (organization_id, resource_role, id);
create index role_assignments_of_group on role_assignments (group_id, id);
create index role_assignments_on_resource on role_assignments (resource_id, id);
