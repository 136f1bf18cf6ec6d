const MAX_REDIRECTS = 10;
const PAGE = { accept: "text/html,*/*" };

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

interface Cookie {
  name: string;
  value: string;
  path: string;
}

/** A browser without scripts: it follows redirects and keeps cookies, each for the host, port and path that it was set for. */
export class Browser {
  readonly #jar = new Map<string, Cookie[]>();
  /** `Set-Cookie` headers in the order in which they came. */
  readonly setCookies: string[] = [];

  /** Value of a cookie that is sent to a URL. */
  cookie(url: string, name: string): string | undefined {
    return this.#sentTo(url).find((cookie) => cookie.name === name)?.value;
  }

  /** Opens an address as one that is typed in or followed; `stopAt` is a redirect that is not followed. */
  visit(url: string, options: { stopAt?: (url: string) => boolean } = {}): Promise<Page> {
    return this.#go(url, { method: "GET", headers: PAGE }, options.stopAt);
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
    for (let at = url, sent = init; redirects.length <= MAX_REDIRECTS; sent = { method: "GET", headers: PAGE }) {
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

  #sentTo(url: string): Cookie[] {
    const { host, pathname } = new URL(url);
    const isBelow = (path: string) => pathname === path || pathname.startsWith(path.replace(/\/?$/, "/"));
    return (this.#jar.get(host) ?? []).filter(({ path }) => isBelow(path));
  }

  #cookies(url: string): Record<string, string> {
    const cookies = this.#sentTo(url).map(({ name, value }) => `${name}=${value}`);
    return cookies.length ? { cookie: cookies.join("; ") } : {};
  }

  #keep(url: string, headers: readonly string[]): void {
    const { host } = new URL(url);
    for (const header of headers) {
      this.setCookies.push(header);
      const [, name = "", value = ""] = /^([^=]+)=([^;]*)/.exec(header) ?? [];
      const path = /;\s*path=([^;]*)/i.exec(header)?.[1] ?? "/";
      const others = (this.#jar.get(host) ?? []).filter((each) => each.name !== name || each.path !== path);
      this.#jar.set(host, /;\s*max-age=0/i.test(header) ? others : [...others, { name, value, path }]);
    }
  }
}
