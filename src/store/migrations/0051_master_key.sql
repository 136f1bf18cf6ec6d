-- Set while the values of the installation are being sealed anew, to the check of the next master key.
alter table installation add column next_master_key_check bytea;

-- A sealed value names the key that it opens with, see store/envelope.ts. One under a key that is being replaced must not
-- come in after those in the table have been found: so a process that still has that key cannot store any.
create function refuse_retired_key() returns trigger language plpgsql as $$
declare
  sealed bytea;
  current_check bytea;
begin
  execute format('select ($1).%I', tg_argv[0]) using new into sealed;
  if sealed is null then
    return new;
  end if;
  select coalesce(next_master_key_check, master_key_check) into current_check from installation for share;
  if substring(sealed from 2 for 8) is distinct from substring(current_check for 8) then
    raise exception 'the value is sealed with another master key' using errcode = 'BK001';
  end if;
  return new;
end $$;

-- Called after migrations: a column whose name begins with sealed_ holds such values.
create function guard_sealed_columns() returns void language plpgsql as $$
declare
  found record;
begin
  for found in
    select table_name, column_name, column_name || '_key' as guard from information_schema.columns c
    where table_schema = current_schema() and column_name like 'sealed\_%' and data_type = 'bytea'
      and not exists (select from pg_trigger where tgrelid = format('%I', table_name)::regclass and tgname = c.column_name || '_key')
  loop
    execute format('create trigger %I before insert or update of %I on %I for each row execute function refuse_retired_key(%L)',
      found.guard, found.column_name, found.table_name, found.column_name);
  end loop;
end $$;
