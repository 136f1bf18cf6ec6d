import type { DescService } from "@bufbuild/protobuf";
import { Code, ConnectError, type ServiceImpl } from "@connectrpc/connect";

/** Names of the RPCs of a service as its implementation spells them, for example `readFile`. */
export type MethodName<S extends DescService> = Extract<keyof S["method"], string>;

/** Names that a list holds more than once; never if there are none. */
type Repeated<Names extends readonly unknown[]> = Names extends readonly [infer First, ...infer Rest]
  ? (First extends Rest[number] ? First : never) | Repeated<Rest>
  : never;

type Distinct<Names extends readonly unknown[]> = [Repeated<Names>] extends [never]
  ? unknown
  : { listedTwice: Repeated<Names> };

/**
 * Completes a service whose `pending` RPCs are not built yet: they answer UNIMPLEMENTED. An RPC in neither place, in
 * both (of a literal), or listed twice does not compile.
 */
export function withPending<S extends DescService, const Names extends readonly MethodName<S>[]>(
  service: S,
  pending: Names & Distinct<Names>,
  impl: Omit<ServiceImpl<S>, Names[number]>,
): ServiceImpl<S> {
  const missing = Object.fromEntries(pending.map((name: string) => [name, () => refuse(service, name)]));
  return { ...impl, ...missing } as unknown as ServiceImpl<S>;
}

function refuse(service: DescService, name: string): never {
  throw new ConnectError(`${service.typeName}.${service.method[name]?.name} is not implemented`, Code.Unimplemented);
}
