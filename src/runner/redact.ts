const TOKEN = /berth_[a-z]{3,4}_[0-9A-Za-z]{43,}/g;
const USERINFO = /(\b[a-z][a-z0-9+.-]*:\/\/)[^/@\s]+@/gi;
const AUTHORIZATION = /(authorization:\s*\S+\s+)\S+/gi;

/** Text without tokens of this product, credentials in URLs and authorization headers. */
export const redact = (text: string): string =>
  text.replace(TOKEN, "[redacted]").replace(USERINFO, "$1[redacted]@").replace(AUTHORIZATION, "$1[redacted]");
