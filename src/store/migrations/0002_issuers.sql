-- Who had a credential issued, where that is not its subject: the person behind a service account's access token. Kept
-- with every entry that is made with it, for the token itself is removed after its end.
alter table tokens add column issuer_id uuid;
alter table audit_log add column issuer_id uuid;
