const HOUR_MS = 60 * 60_000;
const LIFE_MS = 90 * 24 * HOUR_MS;
/** How long a key is published before its first use and after its last: whoever verifies may keep key sets that long. */
const NOTICE_MS = 24 * HOUR_MS;

/** When a key comes into use. Keys are in the order of that, the oldest first. */
export interface KeyTimes {
  activeAt: Date;
}

const later = (time: Date, ms: number) => new Date(time.getTime() + ms);

/** The key that signs now: the one that came into use last. Undefined before the first. */
export const currentKey = <K extends KeyTimes>(keys: readonly K[], now: Date): K | undefined =>
  keys.findLast(({ activeAt }) => activeAt <= now);

/** Whether the key at this place has been out of use for so long that nothing signed by it is valid any more. */
export function isRetired(keys: readonly KeyTimes[], index: number, now: Date): boolean {
  const next = keys[index + 1];
  return next !== undefined && later(next.activeAt, NOTICE_MS) <= now;
}

/** When a new key is to come into use, if it is time to make one; the first one at once. */
export function nextKeyAt(keys: readonly KeyTimes[], now: Date): Date | undefined {
  const newest = keys.at(-1);
  if (!newest) return now;
  const due = later(newest.activeAt, LIFE_MS);
  const earliest = later(now, NOTICE_MS);
  if (due > earliest) return undefined;
  return earliest;
}
