import { openStage } from "./stage.ts";
import { findCaller } from "../src/store/tokens.ts";
import { getEnvironment } from "../src/store/environments.ts";
import { percentile } from "./measure.ts";
const s = await openStage();
try {
  const [m] = await s.people(1);
  const c: any = await findCaller(s.db.point, s.admin.token, new Date());
  const cm: any = await findCaller(s.db.point, m!.token, new Date());
  const [copy] = await s.copies(1, s.admin.id);
  const t = async (name: string, f: () => Promise<unknown>) => {
    const xs: number[] = []; const c0 = process.cpuUsage(); const N = 6000;
    for (let i = 0; i < N; i++) { const a = performance.now(); await f(); xs.push((performance.now() - a) * 1000); }
    const d = process.cpuUsage(c0);
    console.log(name.padEnd(30), "p10", percentile(xs, 10).toFixed(0), "p50", percentile(xs, 50).toFixed(0), "us; node cpu", ((d.user + d.system) / N).toFixed(0));
  };
  for (let r = 0; r < 2; r++) {
    await t("select 1", () => s.db.point`select 1`);
    await t("findCaller admin", () => findCaller(s.db.point, s.admin.token, new Date()));
    await t("findCaller member", () => findCaller(s.db.point, m!.token, new Date()));
    await t("raw by id", () => s.db.point`select metadata, spec, status from environments where id = ${s.environment.id}`);
    await t("getEnvironment admin", () => getEnvironment(s.db.point, c.caller, s.environment.id));
    await t("getEnvironment member", () => getEnvironment(s.db.point, cm.caller, copy!));
  }
} finally { await s.close(); }
