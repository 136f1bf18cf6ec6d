-- Also a user that moves to another account shows what that one says.
drop trigger users_copy_account on users;
create trigger users_copy_account before insert or update of account_id on users
  for each row when (new.account_id is not null) execute function copy_account_to_user();

-- Members are counted for everybody who looks at an organization from outside.
create index users_active on users (organization_id) where status = 1;
create index organizations_invite_domains on organizations using gin (invite_domains);
