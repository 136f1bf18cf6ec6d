import type { DescService } from "@bufbuild/protobuf";
import { Code, ConnectError, type ServiceImpl } from "@connectrpc/connect";

/** Names of the RPCs of a service as its implementation spells them, for example `readFile`. */
export type MethodName<S extends DescService> = Extract<keyof S["method"], string>;

/**
 * Completes a service whose `pending` RPCs are not built yet: they answer UNIMPLEMENTED. An RPC in neither place, or in
 * both, does not compile.
 */
export function withPending<S extends DescService, const P extends MethodName<S>>(
  service: S,
  pending: readonly P[],
  impl: Omit<ServiceImpl<S>, P>,
): ServiceImpl<S> {
  const missing = Object.fromEntries(pending.map((name) => [name, () => refuse(service, name)]));
  return { ...impl, ...missing } as unknown as ServiceImpl<S>;
}

function refuse(service: DescService, name: string): never {
  throw new ConnectError(`${service.typeName}.${service.method[name]?.name} is not implemented`, Code.Unimplemented);
}
