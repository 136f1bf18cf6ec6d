import type { ConnectError } from "@connectrpc/connect";
import { encodeEnvelope, mergeNonProtocolHeaders } from "@connectrpc/connect/protocol";
import { codeToHttpStatus, endStreamFlag, endStreamToJson, errorToJson } from "@connectrpc/connect/protocol-connect";
import { setTrailerStatus } from "@connectrpc/connect/protocol-grpc";
import { answerJson, type HttpRequest, type HttpResponse, toNodeHeaders } from "./exchange.ts";

/** Answers a call with an error before anything of it was looked at but its content type. */
export function answerError(request: HttpRequest, response: HttpResponse, error: ConnectError): void {
  if (response.headersSent || response.writableEnded) return;
  const [contentType = "application/json", protocol] =
    /^application\/(grpc|connect)(-web)?(-text)?(\+(proto|json))?/.exec(request.headers["content-type"] ?? "") ?? [];
  if (protocol === "grpc") {
    response.writeHead(200, { "content-type": contentType, ...toNodeHeaders(setTrailerStatus(new Headers(), error)) });
    response.end();
  } else if (protocol === "connect") {
    const end = Buffer.from(JSON.stringify(endStreamToJson(new Headers(), error, undefined)));
    response.writeHead(200, { "content-type": contentType });
    response.end(encodeEnvelope(endStreamFlag, end));
  } else {
    const headers = new Headers();
    mergeNonProtocolHeaders(headers, error.metadata);
    const body = errorToJson(error, undefined) as object;
    answerJson(response, codeToHttpStatus(error.code), body, toNodeHeaders(headers) as Record<string, string>);
  }
}
