import postgres from "postgres";

/** The driver without the product around it. The host of a Unix socket stands in the query of the URL, as with libpq. */
export function bareDriver(databaseUrl: string, options: { max: number; max_pipeline?: number }): postgres.Sql {
  const url = new URL(databaseUrl);
  const host = url.searchParams.get("host");
  url.searchParams.delete("host");
  return postgres(url.toString(), { ...(host ? { host } : {}), onnotice: () => undefined, ...options });
}
