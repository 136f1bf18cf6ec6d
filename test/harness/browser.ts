const MAX_REDIRECTS = 10;

/** What a browser shows. */
export interface Page {
  /** Where it is. */
  url: string;
  status: number;
  text: string;
  headers: Headers;
  /** Addresses that it was sent to on the way. */
  redirects: string[];
}

/** A browser without scripts: it follows redirects and keeps cookies, each for the host and port that set it. */
export class Browser {
  readonly #jar = new Map<string, Map<string, string>>();
  /** `Set-Cookie` headers in the order in which they came. */
  readonly setCookies: string[] = [];

  /** Value of a cookie of the host of a URL. */
  cookie(url: string, name: string): string | undefined {
    return this.#jar.get(new URL(url).host)?.get(name);
  }

  /** Opens an address as one that is typed in or followed; `stopAt` is a redirect that is not followed. */
  visit(url: string, options: { stopAt?: (url: string) => boolean } = {}): Promise<Page> {
    return this.#go(url, { method: "GET" }, options.stopAt);
  }

  /** Sends a form of a page at `origin`, by default that of the address itself. */
  submit(
    url: string,
    fields: Record<string, string>,
    options: { origin?: string; stopAt?: (url: string) => boolean } = {},
  ): Promise<Page> {
    const origin = options.origin ?? new URL(url).origin;
    const headers = {
      ...{ origin, "content-type": "application/x-www-form-urlencoded" },
      "sec-fetch-site": origin === new URL(url).origin ? "same-origin" : "cross-site",
    };
    return this.#go(url, { method: "POST", headers, body: new URLSearchParams(fields).toString() }, options.stopAt);
  }

  /** Sends JSON, as a script of the page does. */
  async send(url: string, body: object, origin = new URL(url).origin): Promise<Page> {
    const headers = { origin, "content-type": "application/json" };
    return this.#go(url, { method: "POST", headers, body: JSON.stringify(body) });
  }

  async #go(url: string, init: RequestInit, stopAt?: (url: string) => boolean): Promise<Page> {
    const redirects: string[] = [];
    for (let at = url, sent = init; redirects.length <= MAX_REDIRECTS; sent = { method: "GET" }) {
      const response = await fetch(at, {
        ...sent,
        redirect: "manual",
        headers: { ...sent.headers, ...this.#cookies(at) },
      });
      this.#keep(at, response.headers.getSetCookie());
      const location = response.headers.get("location");
      const text = await response.text();
      if (location) redirects.push(new URL(location, at).href);
      if (!location || stopAt?.(redirects.at(-1) ?? "")) {
        return { url: at, status: response.status, text, headers: response.headers, redirects };
      }
      at = redirects.at(-1) ?? "";
    }
    throw new Error(`${url} redirects without end: ${redirects.join(" ")}`);
  }

  #cookies(url: string): Record<string, string> {
    const cookies = [...(this.#jar.get(new URL(url).host) ?? [])].map(([name, value]) => `${name}=${value}`);
    return cookies.length ? { cookie: cookies.join("; ") } : {};
  }

  #keep(url: string, headers: readonly string[]): void {
    const { host } = new URL(url);
    const jar = this.#jar.get(host) ?? new Map<string, string>();
    this.#jar.set(host, jar);
    for (const header of headers) {
      this.setCookies.push(header);
      const [, name = "", value = ""] = /^([^=]+)=([^;]*)/.exec(header) ?? [];
      if (/;\s*max-age=0/i.test(header)) jar.delete(name);
      else jar.set(name, value);
    }
  }
}
