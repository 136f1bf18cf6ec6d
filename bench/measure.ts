/** The middle of some figures; NaN of none. */
export function median(figures: readonly number[]): number {
  return percentile(figures, 50);
}

/** Nearest-rank percentile, `rank` from 0 to 100; NaN of no figures. */
export function percentile(figures: ArrayLike<number>, rank: number): number {
  const sorted = Float64Array.from(figures).sort();
  const index = Math.min(sorted.length - 1, Math.max(0, Math.ceil((rank / 100) * sorted.length) - 1));
  return sorted[index] ?? Number.NaN;
}

/** What the rounds gave for each variant, in the order of the rounds. */
export type Rounds<Name extends string, Result> = Record<Name, Result[]>;

/**
 * Measures variants round by round, so that whatever else the machine does at the time meets all of them. Every other
 * round runs backwards: drift inside a round cancels out.
 */
export async function interleaved<Name extends string, Result>(
  rounds: number,
  variants: Record<Name, () => Promise<Result>>,
): Promise<Rounds<Name, Result>> {
  const names = Object.keys(variants) as Name[];
  const results = Object.fromEntries(names.map((name) => [name, [] as Result[]])) as Rounds<Name, Result>;
  for (let round = 0; round < rounds; round += 1) {
    for (const name of round % 2 ? [...names].reverse() : names) results[name].push(await variants[name]());
  }
  return results;
}

/** As `interleaved`, after a round that is thrown away: in processes that live on, code that is new to them is slow. */
export async function interleavedWarm<Name extends string, Result>(
  rounds: number,
  variants: Record<Name, () => Promise<Result>>,
): Promise<Rounds<Name, Result>> {
  await interleaved(1, variants);
  return interleaved(rounds, variants);
}

/** Median over the rounds of figure / floor. */
export function ratioOf<Result>(
  figures: readonly Result[],
  floors: readonly Result[],
  value: (result: Result) => number,
): number {
  return median(
    figures.flatMap((figure, round) => {
      const floor = floors[round];
      return floor === undefined ? [] : [value(figure) / value(floor)];
    }),
  );
}

/** Median over the rounds of one value. */
export function medianOf<Result>(results: readonly Result[], value: (result: Result) => number): number {
  return median(results.map(value));
}
