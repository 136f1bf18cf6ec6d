import { setFlagsFromString } from "node:v8";

// Loading a program makes many objects that live on. V8 takes that for a reason to give young ones more and more room,
// some 60 MB in the end, which an idle process never gives back. Kept small meanwhile, it grows later when load asks for it.

const DEFAULT_GROWTH = 2;

/** Call it before most of the program is loaded. */
export const keepYoungObjectsSmall = () => setFlagsFromString("--semi-space-growth-factor=1");

/** Call it when the program is up. */
export const letYoungObjectsGrow = () => setFlagsFromString(`--semi-space-growth-factor=${DEFAULT_GROWTH}`);
