const MAX_LENGTH = 1024;

/** What is wrong with the reference of a container image; undefined if nothing, and for none at all. */
export function imageProblem(image: string): string | undefined {
  if (image.length > MAX_LENGTH) return `must have at most ${MAX_LENGTH} characters`;
  return /^-|[\s\p{Cc}]/u.test(image) ? "is not an image reference" : undefined;
}
