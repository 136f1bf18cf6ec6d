const BATCH = 64;

/** Maps in order with at most 64 at once, so that long lists do not use up file descriptors. */
export async function inBatches<T, R>(items: readonly T[], map: (item: T) => Promise<R>): Promise<R[]> {
  const results: R[] = [];
  for (let start = 0; start < items.length; start += BATCH) {
    results.push(...(await Promise.all(items.slice(start, start + BATCH).map(map))));
  }
  return results;
}
