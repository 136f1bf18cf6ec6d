-- Which version of a credential a reader (an environment, or a runner for its calls) has had, so that the audit log tells
-- of the first time only.
create table host_token_reads (
  reader_id uuid not null,
  token_id uuid not null references host_tokens on delete cascade,
  version bigint not null,
  primary key (reader_id, token_id)
);
create index host_token_reads_token on host_token_reads (token_id);
