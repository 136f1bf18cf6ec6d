import { createHash } from "node:crypto";
import type { HttpResponse } from "./exchange.ts";

/** Text that is HTML already. */
export class Html {
  readonly text: string;

  constructor(text: string) {
    this.text = text;
  }
}

type Content = string | number | undefined | Html | readonly Html[];

const ENTITIES: Readonly<Record<string, string>> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
  "'": "&#39;",
};

function textOf(content: Content): string {
  if (content instanceof Html) return content.text;
  if (Array.isArray(content)) return content.map(({ text }) => text).join("");
  return String(content ?? "").replace(/[&<>"']/g, (char) => ENTITIES[char] ?? "");
}

/** HTML from a template, in which everything that is filled in is text, unless it is HTML already. */
export const html = (strings: TemplateStringsArray, ...contents: readonly Content[]): Html =>
  new Html(String.raw({ raw: strings }, ...contents.map(textOf)));

const STYLE = `body{font:16px/1.5 system-ui,sans-serif;max-width:32rem;margin:15vh auto 0;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.4rem}form{margin:.5rem 0}
button,a.button{font:inherit;padding:.5rem 1rem;border:1px solid #1b1f24;border-radius:.4rem;background:#1b1f24;color:#fff;text-decoration:none;cursor:pointer;display:inline-block;margin:.25rem 0}
button.quiet{background:none;color:#1b1f24}
@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#16181b}button,a.button{border-color:#e6e6e6;background:#e6e6e6;color:#16181b}button.quiet{background:none;color:#e6e6e6}}`;
const STYLE_HASH = createHash("sha256").update(STYLE).digest("base64");

/** A page without scripts, which nobody can frame. Forms go to this server, and from there to `formTargets` at most. */
export function answerPage(
  response: HttpResponse,
  status: number,
  { title, body, formTargets = [] }: { title: string; body: Html; formTargets?: readonly string[] },
): void {
  const { text } = html`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>${title}</title>
<style>${new Html(STYLE)}</style></head><body><h1>${title}</h1>${body}</body></html>
`;
  const policy = [
    "default-src 'none'",
    `style-src 'sha256-${STYLE_HASH}'`,
    `form-action ${["'self'", ...formTargets].join(" ")}`,
    ...["frame-ancestors 'none'", "base-uri 'none'"],
  ];
  response.writeHead(status, {
    "content-type": "text/html; charset=utf-8",
    "content-length": String(Buffer.byteLength(text)),
    "content-security-policy": policy.join("; "),
    "cache-control": "no-store",
    // With "no-referrer" browsers would not say where a form comes from.
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
  });
  response.end(text);
}
