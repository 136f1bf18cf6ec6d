const TOKEN = /berth_[a-z]{3,4}_[0-9A-Za-z]{43,}/g;
const USERINFO = /(\b[a-z][a-z0-9+.-]*:\/\/)[^/@\s]+@/gi;
const AUTHORIZATION = /(authorization:\s*\S+\s+)\S+/gi;

// Anything shorter would make a log unreadable and could still be guessed; so could most short lines of files.
const SHORTEST_VALUE = 4;
const SHORTEST_LINE = 8;

/** What must not be readable in a log of these secret values, line by line since a log has lines; the longest first. */
export function hiddenTexts(values: Iterable<string>): string[] {
  const texts = [...values].flatMap((value) => {
    const lines = value.split(/[\r\n]+/).map((line) => line.trim());
    return [value.trim(), ...lines.filter((line) => line.length >= SHORTEST_LINE)];
  });
  const hidden = [...new Set(texts)].filter((text) => text.length >= SHORTEST_VALUE);
  return hidden.sort((left, right) => right.length - left.length);
}

/** Text without these texts, tokens of this product, credentials in URLs and authorization headers. */
export const redact = (text: string, hidden: readonly string[] = []): string =>
  hidden
    .reduce((rest, each) => rest.replaceAll(each, "[redacted]"), text)
    .replace(TOKEN, "[redacted]")
    .replace(USERINFO, "$1[redacted]@")
    .replace(AUTHORIZATION, "$1[redacted]");
