import { type ParseArgsConfig, parseArgs } from "node:util";
import { ConfigError } from "../config.ts";

/** A command line that says nothing sensible: the program ends with exit code 2 and this text. */
export class UsageError extends ConfigError {}

type Options = NonNullable<ParseArgsConfig["options"]>;
type Values<T extends Options> = ReturnType<
  typeof parseArgs<{ options: T; strict: true; allowPositionals: false }>
>["values"];

/** Options of a command, which takes nothing else; `usage` is shown with what is wrong. */
export function readOptions<const T extends Options>(usage: string, args: readonly string[], options: T): Values<T> {
  try {
    return parseArgs({ args: [...args], options, strict: true, allowPositionals: false }).values;
  } catch (error) {
    throw new UsageError(`${error instanceof Error ? error.message : String(error)}\n\n${usage}`);
  }
}

/** Options of a command, and the operands that it takes, exactly so many. */
export function readArguments<const T extends Options>(
  usage: string,
  args: readonly string[],
  options: T,
  count: number,
): { values: Values<T>; operands: string[] } {
  try {
    const { values, positionals } = parseArgs({ args: [...args], options, strict: true, allowPositionals: true });
    if (positionals.length !== count || positionals.includes("")) {
      throw new Error(positionals.length > count ? "there are too many arguments" : "something is missing");
    }
    return { values: values as Values<T>, operands: positionals };
  } catch (error) {
    throw new UsageError(`${error instanceof Error ? error.message : String(error)}\n\n${usage}`);
  }
}

/** The value of an option that has to be there. */
export function required(usage: string, name: string, value: string | undefined): string {
  if (!value?.trim()) throw new UsageError(`--${name} is missing\n\n${usage}`);
  return value.trim();
}

/** A whole number of an option, from `min` to `max`. */
export function wholeNumber(name: string, text: string, min: number, max: number): number {
  const number = Number(text);
  if (!/^\d+$/.test(text) || number < min || number > max) {
    throw new UsageError(`--${name} must be a whole number from ${min} to ${max}`);
  }
  return number;
}

/** A time of an option, in RFC 3339 or its date alone; undefined without one. */
export function time(name: string, text: string | undefined): Date | undefined {
  if (text === undefined) return undefined;
  const parsed = new Date(text);
  if (!/^\d{4}-\d\d-\d\d/.test(text) || Number.isNaN(parsed.getTime())) {
    throw new UsageError(`--${name} must be a date or time such as 2026-01-31 or 2026-01-31T12:00:00Z`);
  }
  return parsed;
}
