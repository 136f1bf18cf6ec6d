import { answerJson, type HttpHandler } from "./exchange.ts";

/** Refuses everything but reads; what a request carries besides is not looked at. */
export function onlyGet(serve: HttpHandler): HttpHandler {
  return (request, response, peer) => {
    request.resume();
    if (request.method === "GET" || request.method === "HEAD") return serve(request, response, peer);
    answerJson(response, 405, { message: "use GET" }, { allow: "GET, HEAD" });
  };
}
